"""Leaves out of the site the signatures that `make signatures` writes into the reference: autodoc has its own."""

import re
from typing import Any

from signatures import BEGIN, END


def leave_out(app: Any, page: str, source: list[str]) -> None:
    """Take what stands between the two marks out of a page before it is read."""
    source[0] = re.sub(f"{BEGIN}.*?{END}", "", source[0], flags=re.DOTALL)


def setup(app: Any) -> dict[str, bool]:
    """Look at every page before it is read."""
    app.connect("source-read", leave_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
