"""Text views as pictures, through the browser that draws plotly's pictures too."""

import asyncio
import base64
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

WIDTH: Final = 800
"""Of the picture, in CSS pixels; its height is what the view needs."""
LOADED: Final = """new Promise((done) => document.readyState === "complete" ? done() : addEventListener("load", done))
    .then(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))))"""
HEIGHT: Final = "Math.ceil(document.documentElement.getBoundingClientRect().height)"
MARKUP: Final = """(() => {
  for (const script of document.querySelectorAll("script")) script.remove();
  return new XMLSerializer().serializeToString(document.querySelector("main"));
})()"""


def printed(page: str, kind: str) -> bytes:
    """A page as "pdf", "svg" or "png", on white and as high as it is.

    An SVG holds the view's own markup in a `foreignObject`, with its text as text: browsers draw it, and most drawing
    programs do not, for which there is PDF.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as aside:  # a notebook's own loop is running
        path = Path(folder) / "view.html"
        path.write_text(page, encoding="utf-8")
        return aside.submit(asyncio.run, _printed(path.as_uri(), kind)).result()


async def _printed(address: str, kind: str) -> bytes:
    import choreographer

    async with choreographer.Browser(headless=True) as browser:
        tab = await browser.create_tab("about:blank")

        async def tell(command: str, **parameters: Any) -> dict[str, Any]:
            answer = await tab.send_command(command, parameters)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            return answer["result"]

        async def run(expression: str) -> Any:
            found = await tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
            return found["result"].get("value")

        async def sized(height: int) -> None:
            size = {"width": WIDTH, "height": height}
            await tell("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=2, mobile=False)

        light = [{"name": "prefers-color-scheme", "value": "light"}]
        await tell("Emulation.setEmulatedMedia", media="screen", features=light)
        await sized(600)
        await tell("Page.navigate", url=address)
        await run(LOADED)
        height = await run(HEIGHT)
        if kind == "svg":
            size = f'width="{WIDTH}" height="{height}"'
            inside = f"<foreignObject {size}>{await run(MARKUP)}</foreignObject>"
            return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{inside}</svg>'.encode()
        if kind == "pdf":
            paper = {"paperWidth": WIDTH / 96, "paperHeight": (height + 1) / 96}
            margins = {f"margin{side}": 0 for side in ("Top", "Bottom", "Left", "Right")}
            found = await tell("Page.printToPDF", printBackground=True, **paper, **margins)
        else:
            await sized(height)
            found = await tell("Page.captureScreenshot", format="png")
        return base64.b64decode(found["data"])
