"""Draw the pictures of README with the tutor, in headless Chromium: `make pictures`."""

from pathlib import Path

from shooting import chromium, html_of, shoot

from fsteer_lens import figures, generate, tutor

DOCS = Path(__file__).parents[1] / "docs"


def first_look() -> str:
    """A steered text, token by token."""
    model, told = tutor.load(), tutor.data("safe")
    steering = tutor.fit(model, "safe", progress=False)
    contrasts = {str(contrast.label): contrast for contrast in reversed(told.test)}
    chosen = {"weapons": contrasts["weapons"], "theft": contrasts["theft"], "near miss": told.near_miss_test[0]}
    prompts = [one.prompt for one in chosen.values()]
    texts = generate(model, prompts, steering, max_new_tokens=32, compare=True, replay=True, progress=False)
    return html_of(figures.replay(texts, titles=list(chosen)))


if __name__ == "__main__":
    with chromium() as browser:
        shoot(browser, first_look(), DOCS / "images" / "first-look.png", width=1180)
