"""Draw the pictures of README with the tutor, in headless Chromium: `make pictures`."""

from pathlib import Path

from shooting import chromium, html_of, shoot

from fsteer_lens import collect, figures, generate, tutor

DOCS = Path(__file__).parents[1] / "docs"


def first_look() -> str:
    """The experts of all harmful test prompts, and three prompts with and without steering."""
    model, told = tutor.load(), tutor.data("safe")
    steering = tutor.fit(model, "safe", progress=False)
    layer = steering.layers[0]
    tested = collect(model, told.test, layer=layer, shift="last_prompt", batch_size=64, progress=False)
    routing = figures.expert_routing(steering.experts_at(layer).route(tested.queries), tested.labels)
    contrasts = {str(contrast.label): contrast for contrast in reversed(told.test)}
    chosen = {"weapons": contrasts["weapons"], "theft": contrasts["theft"], "near miss": told.near_miss_test[0]}
    texts = generate(
        model, [one.prompt for one in chosen.values()], steering, max_new_tokens=32, compare=True, progress=False
    )
    return html_of(routing) + str(figures.steer_compare(texts, titles=list(chosen)))


if __name__ == "__main__":
    with chromium() as browser:
        shoot(browser, first_look(), DOCS / "images" / "first-look.png", width=1100)
