"""Draw every figure from the tutor and write docs/gallery.md, with the code that drew it: `make gallery`."""

from pathlib import Path
from typing import Any, Final, NamedTuple

from shooting import chromium, html_of, shoot

DOCS: Final = Path(__file__).parents[1] / "docs"
PICTURES: Final = DOCS / "images" / "gallery"

SETUP: Final = """\
import fsteer_lens as fs
from fsteer_lens import effects, figures

model, data = fs.tutor.load(), fs.tutor.data("safe")
trained = fs.tutor.activations(model, "safe", progress=False)
steering = fs.tutor.fit(model, "safe", activations=trained, progress=False)
gate, experts, layer = steering.gate, steering.experts, steering.layer

harmful = data.test[::3]  # test prompts that need steering, with a wanted and an unwanted answer
general = [task.prompt for task in data.general_test[::3]]  # and others, to be left alone
answers = [task.answer for task in data.general_test[::3]]
read = fs.collect(model, harmful, layer=layer, shift="last_prompt", batch_size=64, progress=False)
queries = {
    "harmful": read.queries,
    "general": fs.collect_queries(model, general, layer=layer, batch_size=64, progress=False).queries,
}

prompts = [harmful[0].prompt, harmful[40].prompt, harmful[80].prompt, general[0]]
made = fs.generate(model, prompts, steering, compare=True, max_new_tokens=24, progress=False)
trace = made.trace  # all that the figures of generation need: trace.to_jsonl("trace.jsonl") keeps it
"""


class Entry(NamedTuple):
    """One figure of the gallery."""

    name: str
    shows: str
    code: str


ENTRIES: Final = (
    Entry(
        "replay",
        "A generation to be watched, token by token: the sentence is the axis, and below each token stands what the"
        " unsteered model would say, the gate's score, what is added of each expert, the change in every layer, and KL."
        " A click, the arrow keys or space choose a token, and what happened there is told and drawn. `fsteer-lens"
        " watch` writes such a page.",
        "watched = fs.generate(model, prompts, steering, compare=True, replay=True, "
        "max_new_tokens=24, progress=False)\n"
        'figures.replay(watched, titles=["weapons", "hacking", "fraud", "general"])',
    ),
    Entry(
        "steer_compare",
        "Unsteered beside steered text. The shade of a word is how far its distribution moved; hovering tells the"
        " likeliest words on both sides.",
        "figures.steer_compare(trace)",
    ),
    Entry(
        "trace_timeline",
        "Gate, size of the change and KL to the unsteered model, token by token. The tutor is steered over the prompt,"
        " so one push at its last token turns the first word, and the rest follows by itself.",
        "figures.trace_timeline(trace)",
    ),
    Entry(
        "token_scores",
        "A score at every token of a text, here how much of the gate's subspace energy ratio (SER) goes when the"
        " token is left out. A trace in its place draws the size of the change, with marks that tell steered tokens,"
        " padding and the beginning-of-sequence token apart.",
        "figures.token_scores(effects.explain_gate(model, steering, prompts[0]))",
    ),
    Entry(
        "token_experts",
        "The weights that each token would get from the experts, read with a probe that changes nothing.",
        "probe = fs.ExpertProbe(experts, layer=layer)\n"
        "probed = fs.generate(model, prompts[0], probe, max_new_tokens=12, progress=False).trace\n"
        "figures.token_experts(probed)",
    ),
    Entry(
        "logprob_change",
        "What steering raised and lowered most at one step, here the first token of an answer; without `step=` over all"
        " generated tokens. A hatched bar is a bound: the token is among the likeliest on one side only.",
        "figures.logprob_change(trace, row=0, step=0)",
    ),
    Entry(
        "gate_per_prompt",
        "What the gate makes of every prompt: a row each, filled where it is steered. With up to 40 prompts their texts"
        " stand beside their rows.",
        "few = {name: rows[::9] for name, rows in queries.items()}\n"
        'texts = {"harmful": harmful.prompts[::9], "general": general[::9]}\n'
        "figures.gate_per_prompt(gate, few, texts)",
    ),
    Entry(
        "gate_separation",
        "Energy ratios of the two kinds of prompt with the gate's threshold, and the ROC curve. Where they do not"
        " overlap, the gap between them is shown.",
        'figures.gate_separation(gate, queries["harmful"], queries["general"])',
    ),
    Entry(
        "rank_explorer",
        "Who is steered at which rank of the subspace: everything is in the page, so the slider needs no kernel.",
        'figures.rank_explorer(gate, queries, {"harmful": harmful.prompts, "general": general})',
    ),
    Entry(
        "scree",
        "Variance along each direction of the subspace, and by how much each rank tells the two kinds of prompt apart.",
        'ranks = effects.rank_sweep(gate, queries["harmful"], queries["general"])\n'
        "figures.scree(gate.subspace, ranks, rank=gate.rank)",
    ),
    Entry(
        "expert_routing",
        "Weight of each expert for each prompt, in the expert's colour, and beside it the gate: a row whose gate is"
        " shut is faded. Labels follow their experts, so experts of their own make a diagonal.",
        "weights = experts.route(read.queries)\n"
        "figures.expert_routing(weights, read.labels, gate=gate(read.queries), names=experts.names)",
    ),
    Entry(
        "expert_knockout",
        "What every label loses when an expert is removed, beside the expert's weight there: a weight shows where the"
        " router sends prompts, the loss whether that matters.",
        "lost = effects.expert_knockout(model, steering, harmful, batch_size=64, progress=False)\n"
        "figures.expert_knockout(lost)",
    ),
    Entry(
        "expert_mix",
        "One prompt's mix: outlines are routed, what is filled is added; and the residual's share of the vector.",
        "figures.expert_mix(experts, read.queries[0])",
    ),
    Entry(
        "expert_geometry",
        "Cosines between the experts, and with the mean shift, which is what a single steering vector would be.",
        "figures.expert_geometry(experts, trained.shifts.mean(dim=0))",
    ),
    Entry(
        "expert_tokens",
        "Tokens that each expert promotes by the direct path through the unembedding. The tutor's experts act at the"
        " prompt, so much of what they do takes later layers and is not in this table.",
        "figures.expert_tokens(effects.expert_tokens(model, experts))",
    ),
    Entry(
        "layer_position",
        "Size of the steering change after every layer and at every token: where it grows, where it dies.",
        "path = effects.propagation(model, steering, made[0].prompt, made[0].tokens)\nfigures.layer_position(path)",
    ),
    Entry(
        "strength_sweep",
        "Effect and KL by strength, and effect against utility, with 95 % bootstrap intervals; several methods overlay."
        " Measured on given answers, so nothing is generated.",
        "methods = {\n"
        '    "FineSteer": steering,\n'
        '    "without its gate": steering.with_gate(None),\n'
        '    "mean shift": fs.steering.fit_mean_shift(trained),\n'
        "}\n"
        "found = effects.strength_sweep(\n"
        "    model, methods, harmful[::2], general[::2], answers=answers[::2], batch_size=64, progress=False\n"
        ")\n"
        "figures.strength_sweep(found)",
    ),
    Entry(
        "layer_sweep",
        "Effect and cost by layer: one pass collects the activations of all; methods are fitted at each.",
        "def ungated(activations):\n"
        '    return fs.fit(activations, gate="none")\n\n\n'
        "found = effects.layer_sweep(\n"
        "    model,\n"
        "    data.train[::4],\n"
        "    harmful[::4],\n"
        "    general[::4],\n"
        '    shift="last_prompt",\n'
        '    methods={"FineSteer without gate": ungated, "mean shift": fs.steering.fit_mean_shift},\n'
        "    answers=answers[::4],\n"
        "    batch_size=64,\n"
        "    progress=False,\n"
        ")\n"
        "figures.layer_sweep(found)",
    ),
)

PAGE: Final = """\
# Gallery

Every figure of `fsteer_lens.figures`, drawn from the tutor by the code above it; `make gallery` runs this page's code
and takes the pictures. Figures are returned, never shown: in a notebook the last line of a cell shows itself,
`figures.save(figure, "figure.html")` writes a page that opens without network, and `.pdf` a picture for a paper (with
`pip install "fsteer-lens[paper]"`, and Chrome or Chromium).

```python
{setup}```
{sections}"""


def drawn(entry: Entry, names: dict[str, Any]) -> Any:
    """Run an entry's code; what its last statement gives is the figure."""
    lines = entry.code.splitlines()
    start = max(index for index, line in enumerate(lines) if line.startswith("figures."))
    exec("\n".join(lines[:start]), names)
    return eval("\n".join(lines[start:]), names)


def seen(entry: Entry) -> str:
    """What there is to see, for who does not: the first sentence."""
    return entry.shows.split(". ")[0].rstrip(".").replace("`", "")


def page() -> str:
    """The text of docs/gallery.md."""
    sections = "".join(
        f"\n## {entry.name}\n\n{entry.shows}\n\n```python\n{entry.code}\n```\n\n"
        f"![{seen(entry)}](images/gallery/{entry.name}.png)\n"
        for entry in ENTRIES
    )
    return PAGE.format(setup=SETUP, sections=sections)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    namespace: dict[str, Any] = {}
    exec(SETUP, namespace)
    with chromium() as browser:
        for one in ENTRIES:
            shoot(browser, html_of(drawn(one, namespace)), PICTURES / f"{one.name}.png", scale=1)
    (DOCS / "gallery.md").write_text(page(), encoding="utf-8")
