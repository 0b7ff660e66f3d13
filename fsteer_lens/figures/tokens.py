"""The tokens of a text, and what each of them is: padding, bos, generated, steered; shared by all token views."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, TypedDict

from jaxtyping import Bool
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import MONO, span, visible
from fsteer_lens.figures.style import STEERED_COLOUR, one_line
from fsteer_lens.ground.checks import normalised, optional, require_unset, several, switch, whole
from fsteer_lens.trace.trace import Marks, Trace

STEERED: Final = f"border-bottom:3px solid {STEERED_COLOUR}"
ALONE: Final = "border-bottom:3px dotted rgba(127,127,127,.6)"
BOS: Final = "box-shadow:inset 0 0 0 1px currentColor;border-radius:3px"
PADDING: Final = "text-decoration:line-through;opacity:.45"
BORDER: Final = "border-left:2px solid;margin:0 4px;opacity:.8"
TEXT: Final = f"{MONO};font-size:14px;line-height:2.1;white-space:pre-wrap;overflow-wrap:anywhere"
MARKS: Final = ("steered", "prompt_length", "first", "bos", "marks")
"""What tells of a token what it is, in a view."""
GLYPHS: Final = {"padding": "▫", "bos": "◆", "steered": "▴"}
"""Put before a token where a view can draw no lines: those of circuitsvis."""


@dataclass(frozen=True)
class Tokens:
    """Texts of s tokens, and of each what it is; None where that is not known.

    Attributes:
        texts: of the tokens.
        padding: no real token.
        bos: the beginning-of-sequence token.
        generated: after the prompt.
        steered: something was added to the residual stream at its position.
    """

    texts: tuple[str, ...]
    padding: tuple[bool, ...]
    bos: tuple[bool, ...]
    generated: tuple[bool, ...] | None
    steered: tuple[bool, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def told(self, index: int) -> list[str]:
        """Lines about a token for its hover text."""
        lines = [f"{index}: {self.texts[index]!r}"]
        if self.padding[index]:
            return [*lines, "padding"]
        if self.bos[index]:
            lines.append("beginning of sequence")
        if self.steered is not None:
            lines.append("steered" if self.steered[index] else "not steered")
        if self.generated is not None:
            lines.append("generated" if self.generated[index] else "prompt")
        return lines

    def html(self, styles: Sequence[str], told: Sequence[str]) -> str:
        """The text with the style of each token, its marks, and on hover what is told of it."""
        parts = []
        starts = self._start()
        for index, (style, line) in enumerate(zip(styles, told, strict=True)):
            if index == starts:
                parts.append(f"<span title='the generated text begins here' style='{BORDER}'></span>")
            first, *others = self.told(index)
            lines = [first, *others] if self.padding[index] else [first, line, *others]
            style = PADDING if self.padding[index] else ";".join(filter(None, [style, self._mark(index)]))
            parts.append(span(visible(self.texts[index]), style, "\n".join(lines)))
        return f'<div dir="auto" style="{TEXT}">{"".join(parts)}</div>'

    def legend(self) -> list[str]:
        """What the marks mean, those that occur."""
        parts = []
        if self.steered is not None:
            parts += [f"<span style='{STEERED}'>steered</span>", f"<span style='{ALONE}'>not steered</span>"]
        if self._start() is not None:
            parts.append(f"prompt<span style='{BORDER}'></span>generated")
        if any(self.bos):
            parts.append(f"<span style='{BOS};padding:0 4px'>beginning of sequence</span>")
        if any(self.padding):
            parts.append(f"<span style='{PADDING}'>padding</span>")
        return parts

    def glyphed(self) -> list[str]:
        """Texts on one line with a glyph before padding, bos and steered tokens, for views that draw no lines."""
        found = []
        for index, text in enumerate(self.texts):
            is_steered = self.steered is not None and self.steered[index]
            marks = (("padding", self.padding[index]), ("bos", self.bos[index]), ("steered", is_steered))
            found.append("".join(GLYPHS[name] for name, here in marks if here) + (one_line(text) or "·"))
        return found

    def _start(self) -> int | None:
        """Where the generated text begins."""
        return self.generated.index(True) if self.generated is not None and True in self.generated else None

    def _mark(self, index: int) -> str:
        lines = "" if self.steered is None else STEERED if self.steered[index] else ALONE
        return ";".join(filter(None, [lines, BOS if self.bos[index] else ""]))


class ViewOptions(TypedDict, total=False):
    """What `token_scores` and `token_experts` both take by name and hand on as `TokenView`."""

    steered: Bool[Tensor, " s"] | None
    prompt_length: int | None
    first: int
    bos: bool
    marks: Marks | None
    legend: bool
    rich: bool
    bundle: bool


@dataclass(frozen=True, eq=False)
class TokenView:
    """What each token of a text is, and how the text is shown.

    Attributes:
        steered: which tokens were steered, [s].
        prompt_length: number of real tokens in the prompt.
        first: index of the first real token; those before it are pads.
        bos: whether the first real token is the beginning-of-sequence token.
        marks: all of that at once, from `Trace.marks`, for tokens that are a row of the padded batch.
        legend: say below what colours and marks mean.
        rich: as a view of circuitsvis.
        bundle: put circuitsvis' code into this view.
    """

    steered: Bool[Tensor, " s"] | None = None
    prompt_length: int | None = None
    first: int = 0
    bos: bool = False
    marks: Marks | None = None
    legend: bool = True
    rich: bool = False
    bundle: bool = True

    def __post_init__(self) -> None:
        normalised(
            self,
            prompt_length=optional(whole, "prompt_length", self.prompt_length, 0),
            first=whole("first", self.first),
            **{name: switch(name, getattr(self, name)) for name in ("bos", "legend", "rich", "bundle")},
        )
        require_unset("a view that is not rich", bundle=None if self.bundle or self.rich else False)

    def tokens(self, given: Sequence[str] | Trace, layer: int | None, row: int) -> Tokens:
        """The tokens of a text, or those of a row of a trace, which has its own marks."""
        if not isinstance(given, Trace):
            marked = row if self.marks is None else 0
            require_unset("tokens, which are no trace", layer=layer, row=marked or None)
            return _tokens_of_text(several("tokens", given, "a list of the tokens' texts"), row, self)
        unset = {item.name: item.default for item in fields(self)}
        told = [name for name in MARKS if getattr(self, name) is not unset[name]]
        if told:
            fix = "Leave them out: a trace knows what its tokens are."
            raise InputError(f"{', '.join(told)} beside a trace", fix=fix)
        return tokens_of_trace(given, layer, row)


def _tokens_of_text(texts: Sequence[str], row: int, view: TokenView) -> Tokens:
    """Tokens whose texts are given, with their marks one by one or all from `Trace.marks`, which have this row."""
    n, marks, steered, length = len(texts), view.marks, view.steered, view.prompt_length
    if n == 0:
        raise InputError("tokens", expected="at least one", got="none")
    if marks is not None:
        if marks.steered.shape[1] != n:
            expected = f"marks of {n} positions, as many as tokens"
            raise InputError("marks", expected=expected, got=marks.steered.shape[1], fix="Give the padded row.")
        row = whole("row", row, 0, len(marks.steered) - 1)
        padding, is_bos, generated, on = (tuple(values[row].tolist()) for values in marks)
        return Tokens(tuple(texts), padding, is_bos, generated, on)
    if steered is not None and len(steered) != n:
        raise InputError("steered", expected=f"one for each of {n} tokens", got=len(steered))
    first = whole("first", view.first, 0, n - 1, why="the first real token")
    return Tokens(
        texts=tuple(texts),
        padding=tuple(index < first for index in range(n)),
        bos=tuple(view.bos and index == first for index in range(n)),
        generated=None if length is None else tuple(index >= first + length for index in range(n)),
        steered=None if steered is None else tuple(bool(one) for one in steered.tolist()),
    )


def tokens_of_trace(trace: Trace, layer: int | None, row: int) -> Tokens:
    """Prompt and generated tokens of one row; the pads before it are cut off.

    Where nothing steered, it is not known what was steered: then no marks tell it.
    """
    if trace.prompts is None or trace.prompt_lengths is None:
        raise InputError("trace", expected="one with token texts, from generate()", got=repr(trace))
    one = trace.row(row)
    assert one.prompts is not None
    prompt, generated = one.prompts[0], one.steps.texts[0] if one.steps is not None else ()
    texts = (*prompt, *generated)
    is_bos = one.bos is not None and bool(one.bos[0])
    steered: tuple[bool, ...] | None = None
    if one.change or layer is not None:
        known = one.marks(layer).steered[0].tolist()[: len(texts)]
        steered = (*known, *[False] * (len(texts) - len(known)))  # the last token is never fed back
    return Tokens(
        texts=texts,
        padding=(False,) * len(texts),
        bos=tuple(is_bos and index == 0 for index in range(len(texts))),
        generated=tuple(index >= len(prompt) for index in range(len(texts))),
        steered=steered,
    )


def title_of(trace: Trace, row: int) -> str:
    """The prompt of a row as it stands in the trace, without the beginning-of-sequence token."""
    assert trace.prompts is not None
    tokens = trace.prompts[row]
    starts = trace.bos is not None and bool(trace.bos[row])
    return "".join(tokens[1:] if starts else tokens)
