"""Views of circuitsvis that work without network, whatever the tokens are.

circuitsvis draws in the browser with a bundle of 1.3 MB. Its own `str(view)` loads that from a network, and it puts
tokens into the page as markup. So its components are called here: the bundle from the installed package, tokens made
harmless, NaN replaced, and a white box around, for it knows no dark pages.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from fsteer_lens.errors import MissingDependencyError
from fsteer_lens.figures.html import Html, block, escape
from fsteer_lens.figures.style import FONT
from fsteer_lens.figures.tokens import GLYPHS, Tokens

WORD_JOINER: Final = "\u2060"
BOX: Final = (
    f"background:#fff;color:#000;border:1px solid #ccc;border-radius:6px;padding:10px 12px;font-family:{FONT};"
    "font-size:14px;overflow-wrap:anywhere;color-scheme:light"
)
STYLE: Final = (
    "<style>.fsteer-lens-rich > div {padding-bottom: 0 !important}"
    ".fsteer-lens-rich [data-popper-interactive] {z-index: 99}</style>"
)
"""Hover texts of circuitsvis lie above all else, and no empty space is kept for them below a view."""
MEANINGS: Final = {"padding": "padding", "bos": "beginning of sequence", "steered": "steered"}


def circuitsvis_bundle() -> Html:
    """The script of circuitsvis, 1.3 MB, to be put on a page once before views that were made with `bundle=False`.

    Raises:
        MissingDependencyError: circuitsvis is not installed.
    """
    return Html(f"<script>{_source()}</script>")


@cache
def _source() -> str:
    """The bundle as a classic script that runs once a page, with nothing in it that ends a script element."""
    found = importlib.util.find_spec("circuitsvis")
    if found is None or found.origin is None:
        raise MissingDependencyError("rich views need circuitsvis", fix="pip install circuitsvis.")
    code = (Path(found.origin).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code = code.split("//# sourceMappingURL")[0].replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return f"window.CircuitsVis = window.CircuitsVis || (() => {{\n{code}\nreturn CircuitsVis;\n}})();"


def harmless(token: str) -> str:
    """A token that reads the same as text and as markup: a word joiner after each `<` and `&` keeps it from either."""
    return token.replace("<", f"<{WORD_JOINER}").replace("&", f"&{WORD_JOINER}")


def rich_view(
    component: str,
    properties: Mapping[str, Any],
    *,
    note: str = "",
    marked: Tokens | None = None,
    bundle: bool = True,
) -> Html:
    """One component of circuitsvis in a white box, with a note above and the meaning of the glyphs below."""
    glyphs = "" if marked is None else _glyphs(marked)
    box = f"<div>{escape(note)}</div>{component_markup(component, properties)}{glyphs}"
    view = block([f'{STYLE}<div style="{BOX}">{box}</div>'])
    return Html((circuitsvis_bundle().body if bundle else "") + view)


def component_markup(component: str, properties: Mapping[str, Any]) -> str:
    """A component of circuitsvis with the script that draws it; until that ran, the plain tokens stand there."""
    name = f"fsteer-lens-{uuid4().hex[:12]}"
    data = json.dumps(_harmless_all(properties), allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    texts = properties.get("tokens", properties.get("prompt", ()))
    return (
        f'<div id="{name}" class="fsteer-lens-rich" style="margin:8px 0">{escape("".join(texts))}</div>'
        f'<script>CircuitsVis.render("{name}", CircuitsVis.{component}, {data})</script>'
    )


def _harmless_all(value: Any) -> Any:
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, Mapping):
        return {key: _harmless_all(item) for key, item in value.items()}
    return [_harmless_all(item) for item in value] if isinstance(value, Sequence) else value


def _glyphs(marked: Tokens) -> str:
    """What the glyphs in front of tokens mean, those that occur."""
    used = {"padding": any(marked.padding), "bos": any(marked.bos), "steered": any(marked.steered or ())}
    told = "   ".join(f"{glyph} {MEANINGS[name]}" for name, glyph in GLYPHS.items() if used[name])
    return f'<div style="font-size:12px;white-space:pre-wrap">{told}</div>' if told else ""
