"""Model cards: what is known of a steering, activations or a trace, as Markdown for the hub.

Only what the value itself knows is told, beside what its author says; the rest is said to be unknown. Texts that
somebody typed, such as labels, stand as code, or quoted with every mark escaped, so that none of them is taken for
Markdown.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from fsteer_lens.evaluation.gate_reports import GateReport
from fsteer_lens.ground.tables import markdown
from fsteer_lens.hooks.objects import HookObject, Link
from fsteer_lens.method.experts import Experts, called
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.fingerprints import Fingerprint
from fsteer_lens.steering.steering import FineSteer, Steering
from fsteer_lens.trace.trace import Trace

KINDS: Final = {
    "steering": "A steering for a language model, made with fsteer_lens: it reads the residual stream at some layers"
    " while the model runs, and edits it there.",
    "activations": "Activations of a language model, read with fsteer_lens: the residual stream at one layer, a row for"
    " each prompt. Steerings are fitted to such.",
    "trace": "A trace, made with fsteer_lens: what steering did to a language model while it ran, row by row, layer by"
    " layer, token by token.",
}
UNKNOWN: Final = "Not known."
UNGATED: Final = "It has none: what it does, it does on every prompt."
MOST_LABELS: Final = 20
USES: Final = {
    "steering": "model = fs.models.load({base_model})\n"
    'steering = fs.load("hf://{name}", model=model)\n'
    "print(fs.generate(model, prompt, steering, compare=True).texts)",
    "activations": 'activations = fs.Activations.load("hf://{name}")',
    "trace": 'trace = fs.Trace.from_jsonl("hf://{name}")',
}
PINNING: Final = (
    "That is the newest commit, which may change. To get the same file every time put `@` and a commit of this"
    " repository behind the name; the one that was found is printed."
)
LIMITS: Final = {
    "steering": (
        "It fits the model above and no other; another one is refused when it is loaded or put on.",
        "Figures are of the data and the prompts that they were measured on. On others they may be worse; nobody has"
        " looked unless it says so here.",
        "A gate is no security boundary: other words, typing errors or a suffix can shut it, and it opens for prompts"
        " that it should leave alone.",
        "**It is no safety guarantee.** A steered model can still say what it was steered away from, and steering can"
        " make other answers worse.",
    ),
    "activations": (
        "Prompts can be guessed from their activations, and labels are kept as they are.",
        "**They are no safety guarantee**, nor is what is fitted to them.",
    ),
    "trace": (
        "It tells what happened with these prompts, and nothing of others.",
        "**It is no safety guarantee.**",
    ),
}


class Told(NamedTuple):
    """What the author says of a value, as `push` takes it."""

    base_model: str | None
    about: str | None
    gates: GateReport | None


def card(value: HookObject | Activations | Trace, kind: str, name: str, told: Told) -> str:
    """The card of a value, with the hub's metadata at its head."""
    from huggingface_hub import ModelCardData

    tags = ["fsteer_lens", "activation-steering", kind]
    metadata = ModelCardData(library_name="fsteer_lens", base_model=told.base_model, tags=tags)
    sections = {
        "What it is": [KINDS[kind], *_what(value)],
        "In its author's words": [_quoted(told.about) if told.about else UNKNOWN],
        "How to use it": [_use(kind, name, told.base_model), PINNING],
        "Base model": _base_model(value, told.base_model),
        "Data": list(_data(value)),
    }
    if isinstance(value, HookObject):
        sections["How it was fitted"] = list(_fits(value)) or [UNKNOWN]
        sections["What its gates do"] = list(_gates(value, told.gates)) or [UNGATED]
    sections["Limits"] = ["\n".join(f"- {limit}" for limit in LIMITS[kind])]
    text = "\n\n".join(f"## {title}\n\n" + "\n\n".join(parts) for title, parts in sections.items())
    return f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n{text}\n"


def _what(value: HookObject | Activations | Trace) -> list[str]:
    """The value in a line, of a chain one for each link with what its class does."""
    if not isinstance(value, HookObject):
        return [_code(repr(value))]
    rows = [[_code(repr(link)), _code((type(link).__doc__ or "").partition("\n")[0])] for link in value.links]
    together = ["Its links act together: all of them read what enters the chain."] if len(rows) > 1 else []
    return [*together, markdown(["what", "does"], rows)]


def _use(kind: str, name: str, base_model: str | None) -> str:
    base = "NAME_OR_FOLDER" if base_model is None else f'"{base_model}"'
    code = USES[kind].format(name=name, base_model=base)
    return f"```python\nimport fsteer_lens as fs\n\n{code}\n```"


def _base_model(value: HookObject | Activations | Trace, base_model: str | None) -> list[str]:
    """The model's name, where its author tells, and its fingerprint."""
    named = "Its name on the hub is not known." if base_model is None else f"{_code(base_model)}, its author says."
    if isinstance(value, Trace):
        return [f"{named} A trace does not know its model."]
    links = value.links if isinstance(value, HookObject) else (value,)
    known = dict.fromkeys(link.fingerprint for link in links)
    return [named, *("Of the model itself nothing is known." if one is None else _fingerprint(one) for one in known)]


def _fingerprint(known: Fingerprint) -> str:
    rows = [
        ["architecture", _code(known.architecture)],
        ["layers, width, tokens that it reads", f"{known.n_layers}, {known.d_model}, {known.d_vocab}"],
        ["fitted or read at", f"{_code(known.site)} of layers {', '.join(map(str, sorted(known.probe)))}"],
        ["loaded as", f"{_code(known.model_class)}, {_code(known.dtype)}"],
        ["weights", "processed by TransformerLens" if known.processed else "as they are"],
        ["tokenizer, SHA-256", _code(known.tokenizer)],
    ]
    return markdown(["what", "value"], rows)


def _data(value: HookObject | Activations | Trace) -> Iterator[str]:
    """What the value knows of the prompts that it comes from."""
    if isinstance(value, Trace):
        texts = [what for what in ("prompts", "steps", "unsteered") if getattr(value, what) is not None]
        yield f"{value.n_rows} prompts. " + (
            "Their texts, and what was generated, are in it." if texts else "Their texts are not in it."
        )
    elif isinstance(value, Activations):
        yield f"{len(value)} prompts{_format(value.prompt_format)}."
        counts = Counter(label for label in value.labels if label is not None)
        yield _counted("label", "prompts", counts.most_common(MOST_LABELS)) if counts else "They have no labels."
        if len(counts) > MOST_LABELS:
            yield f"And {len(counts) - MOST_LABELS} more labels."
    else:
        yield from (text for link in value.links for text in _data_of(link))


def _data_of(link: Link) -> Iterator[str]:
    """What a link knows of its data, layer by layer."""
    where = f"{type(link).__name__}{_format(link.prompt_format)}"
    mixtures = _mixtures(link)
    if not any(experts.report for experts in mixtures.values()):
        yield f"{where}: the number of contrasts that it was fitted to is not known."
    for layer, experts in mixtures.items():
        if experts.report is not None:
            clusters = experts.report.clusters
            yield f"{where}, layer {layer}: {len(clusters)} contrasts, by the expert whose cluster they are in:"
            names = called(experts.n_experts, experts.names)
            counts = [(name, int((clusters == index).sum())) for index, name in enumerate(names)]
            yield _counted("expert", "contrasts", counts)


def _fits(value: HookObject) -> Iterator[str]:
    """What the fits came to, as far as they were measured."""
    for link in value.links:
        if isinstance(link, Steering) and link.shift is not None:
            yield f"{type(link).__name__}: on shifts taken as {_code(link.shift)}, queries read as {_code(link.read)}."
        for layer, experts in _mixtures(link).items():
            if experts.report is None:
                continue
            fitted = experts.report
            how = "in closed form" if fitted.epochs == 0 else f"trained for {fitted.epochs} epochs"
            yield (
                f"Layer {layer}: {experts.n_experts} experts, {how}. Of the shifts that they were fitted to they"
                f" explain {fitted.explained:.3f}."
            )
            yield f"On queries that were held out: {UNKNOWN if fitted.held_out is None else f'{fitted.held_out}.'}"
            if fitted.doubts:
                yield "\n".join(f"- Doubt: {_escaped(doubt)}." for doubt in fitted.doubts)


def _gates(value: HookObject, measured: GateReport | None) -> Iterator[str]:
    """The gates, with what they know of themselves, and what was measured of them."""
    found = [
        [str(layer), _code(repr(gate))]
        for link in value.links
        if isinstance(link, Steering)
        for layer in link.hooked_layers
        if (gate := link.gate_at(layer)) is not None
    ]
    if found:
        yield markdown(["layer", "gate, with what its fit came to"], found)
    if measured is not None:
        yield "Measured by its author with `gate_report`, with 95 % Clopper-Pearson intervals:"
        yield measured.to_markdown()
    elif found:
        yield "What it misses, and where it opens wrongly, under typing errors, suffixes and the like is not known."


def _mixtures(link: Link) -> dict[int, Experts]:
    return {layer: link.experts_at(layer) for layer in link.layers} if isinstance(link, FineSteer) else {}


def _format(known: PromptFormat | None) -> str:
    """How prompts became tokens, to go behind a noun."""
    if known is None or known.chat is None:
        return ""
    return ", through the chat template" if known.chat else ", as plain text"


def _counted(what: str, of_what: str, counts: Sequence[tuple[str, int]]) -> str:
    return markdown([what, of_what], [[_code(name), str(count)] for name, count in counts])


def _printable(text: str) -> str:
    """A text in one line, without what a terminal or a page would act on."""
    return "".join(character if character.isprintable() else " " for character in text)


def _code(text: Any) -> str:
    """A text as code, which is what Markdown leaves alone."""
    return f"`{_printable(str(text)).replace('`', chr(39)) or ' '}`"


def _escaped(text: str) -> str:
    """A text whose marks are no Markdown and no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!]|^[-+=])", r"\\\1", _printable(text).strip())


def _quoted(text: str) -> str:
    """A text of several lines as a quotation."""
    return "\n".join(f"> {_escaped(line)}".rstrip() for line in text.splitlines())
