"""Equations as MathML, which browsers draw themselves: MathJax would be fetched from elsewhere by every reader."""

from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging


def told(node: nodes.Element, as_block: bool) -> str:
    """An equation's MathML; what docutils cannot read is a warning, and stands there as it was written."""
    try:
        # docutils takes \boldsymbol for a switch that lasts to the group's end; its \mathbf has bold Greek too.
        return tex2mathml(node.astext().replace(r"\boldsymbol", r"\mathbf"), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("equation %r: %s", node.astext(), error, location=node)
        return escape(node.astext())


def inline(writer: Any, node: nodes.math) -> None:
    """An equation within a line."""
    writer.body.append(told(node, as_block=False))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    """An equation of its own."""
    writer.body.append(f'<div class="equation">{told(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Make this the renderer of equations."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
