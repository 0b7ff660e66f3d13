"""The replay is live on the site: where a page shows its picture, the site draws it from the trace that is kept."""

import re
from typing import Any

from pictures import live

PICTURE = re.compile(r"!\[[^\]]*\]\(images/first-look\.png\)")


def put(app: Any, page: str, source: list[str]) -> None:
    """Put the replay in the place of its picture."""
    if app.builder.format == "html" and PICTURE.search(source[0]):
        drawn = f"~~~~~~{{raw}} html\n{live()}\n~~~~~~"
        source[0] = PICTURE.sub(lambda _: drawn, source[0])


def setup(app: Any) -> dict[str, bool]:
    """Listen to the build."""
    app.connect("source-read", put)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
