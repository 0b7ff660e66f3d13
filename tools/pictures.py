"""Draw the picture of README with the tutor, in headless Chromium, and keep its trace for the site: `make pictures`."""

from pathlib import Path
from typing import Final

from shooting import chromium, html_of, shoot

from fsteer_lens import Trace, figures, generate, tutor

IMAGES: Final = Path(__file__).parents[1] / "docs" / "images"
TRACE: Final = IMAGES / "first-look.jsonl.gz"
TITLES: Final = ("weapons", "theft", "near miss")


def first_look() -> Trace:
    """Three texts, steered."""
    model, told = tutor.load(), tutor.data("safe")
    steering = tutor.fit(model, "safe", progress=False)
    contrasts = {str(contrast.label): contrast for contrast in reversed(told.test)}
    prompts = [contrasts["weapons"].prompt, contrasts["theft"].prompt, told.near_miss_test[0].prompt]
    return generate(model, prompts, steering, max_new_tokens=32, compare=True, replay=True, progress=False).trace


def live() -> str:
    """The replay of the trace that is kept, for which no model is needed."""
    return str(figures.replay(Trace.from_jsonl(TRACE), titles=TITLES))


if __name__ == "__main__":
    first_look().to_jsonl(TRACE)
    with chromium() as browser:
        shoot(browser, html_of(live()), IMAGES / "first-look.png", width=1180)
