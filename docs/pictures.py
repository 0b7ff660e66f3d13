"""Draw the pictures of README with the tutor, in headless Chromium: `make pictures`."""

import os
from pathlib import Path

from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from fsteer_lens import collect, figures, generate, tutor
from fsteer_lens.cli import find_browser

HERE = Path(__file__).parent


def first_look() -> str:
    """A page with the experts of all harmful test prompts, and three prompts with and without steering."""
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
    compared = figures.steer_compare(texts, tokenizer=model.tokenizer, titles=list(chosen))
    plot = routing.to_html(include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
    style = "body{margin:20px;background:white;color:#222;font-family:sans-serif;width:1060px}"
    return f"<style>{style}</style><script>{get_plotlyjs()}</script>{plot}{compared}"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    executable = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 800}, device_scale_factor=1.5)
        page.set_content(first_look())
        page.wait_for_selector(".heatmaplayer")
        page.screenshot(path=HERE / "images" / "first-look.png", full_page=True)
        browser.close()
