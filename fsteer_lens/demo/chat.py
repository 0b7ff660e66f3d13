"""A chat model steered to refuse: fitted live to requests that the package ships, and looked at on others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from fsteer_lens import figures
from fsteer_lens.demo.requests import CONSENT, HARMFUL, NEAR_MISSES, ORDINARY, REFUSALS, SUMS
from fsteer_lens.evaluation.refusals import refuses
from fsteer_lens.ground.estimates import Proportion
from fsteer_lens.method.experts import called
from fsteer_lens.method.gates import SHUT
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.collecting import collect, collect_queries
from fsteer_lens.report.page import Report
from fsteer_lens.report.steered import REPLAY_CAPTION
from fsteer_lens.run.generation import Generation, Generations, generate
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import FineSteer

if TYPE_CHECKING:
    from fsteer_lens.ground.terminal import Terminal

FITTED: Final = 0.75
"""Share of each list that is fitted to; the rest is what is shown and measured."""
STRENGTH: Final = 1.6
"""What `recipe` chooses on a quarter of what is fitted to (docs/how_to/start_here.md)."""
MAX_NEW_TOKENS: Final = 20
BATCH: Final = 90
"""Rows of a forward pass: all prompts, each steered and not, which takes half the time of eight rows."""
PICTURED: Final = ("fraud", "theft", "bullying")
"""Kinds of request of which one is printed with its answers."""
WATCHED: Final = ("fraud", "near misses", "ordinary")
"""Kinds of prompt of which one is watched token by token."""
HARMFUL_NAME: Final = "harmful"
ALONE: Final = {"near misses": NEAR_MISSES, "ordinary": ORDINARY, "sums": SUMS}
"""What is to be left alone."""

INTRO: Final = (
    "The model is a real chat model, small enough for any laptop. It answers nearly everything that it is asked, also "
    "what it should not. It is shown short requests of six kinds, each with a refusal that says why and a consent, and "
    "prompts that are to be left alone; fitting takes seconds. What follows was measured on other prompts of the "
    "same kinds: a refusal is an answer with a phrase of refusal in it, which says nothing about harm."
)
CAPTIONS: Final = {
    "compare": "The same prompts without and with steering. A shaded word is one that the model would hardly have said "
    "by itself.",
    "gate": "When: the score by which the gate tells the requests (right of the dashed line) from all others.",
    "experts": "How: which expert's vector was used for which request. A row is a request, a filled cell a large "
    "weight; a kind of one colour has an expert of its own.",
}


@dataclass(frozen=True, eq=False)
class Shown:
    """What became of the prompts that nothing was fitted to.

    Attributes:
        steering: what they were steered by.
        made: the answers of each kind of prompt, with those of the unsteered model.
        labels: of each harmful request its kind.
        queries: what the gate reads of each kind of prompt.
        watched: some of the answers with their replays, those of `WATCHED`.
    """

    steering: FineSteer
    made: Mapping[str, Generations]
    labels: Sequence[str]
    queries: Mapping[str, torch.Tensor]
    watched: Generations

    @property
    def layer(self) -> int:
        """The steered layer."""
        return self.steering.layers[0]

    @property
    def names(self) -> tuple[str, ...]:
        """What each expert is best known for: the kind that is most of its cluster."""
        experts = self.steering.experts_at(self.layer)
        return tuple(called(experts.n_experts, experts.names))

    @property
    def examples(self) -> list[tuple[str, Generation]]:
        """Six prompts, each with what kind it is: three requests of different kinds, and one of each other kind."""
        requests = self.made[HARMFUL_NAME]
        firsts = [self.labels.index(kind) for kind in PICTURED]
        alone = [(name, self.made[name][0]) for name in ALONE]
        return [(self.labels[row], requests[row]) for row in firsts] + alone

    def row(self, name: str) -> list[str]:
        """Of a kind of prompt: how many, refused before and after, answers changed, gate, and KL in nats per token."""
        made, layer = self.made[name], self.layer
        before = Proportion(sum(refuses(one.baseline.text) for one in made if one.baseline is not None), len(made))
        after = Proportion(sum(refuses(one.text) for one in made), len(made))
        changed = sum(one.baseline is not None and one.text != one.baseline.text for one in made)
        gate = sum(float(one.trace.gate[layer][0]) for one in made) / len(made)
        kl = sum(_kl(one) for one in made) / len(made)
        shares = [f"{one.hits} of {one.total}" for one in (before, after, Proportion(changed, len(made)))]
        return [name, *shares, f"{gate:.2f}", f"{kl:.3f}"]


COLUMNS: Final = ("prompts", "refused before", "refused", "changed", "gate", "KL, nats a token")


def _kl(one: Generation) -> float:
    """Mean KL(steered ‖ unsteered) over the tokens of a steered answer, in nats."""
    steps = one.trace.steps
    return 0.0 if steps is None or steps.kl is None else float(steps.kl.nanmean())


def parts(items: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What is fitted to, and what is shown."""
    cut = round(FITTED * len(items))
    return items[:cut], items[cut:]


def fitted(model: SteerableModel) -> tuple[FineSteer, Activations]:
    """A steering half way up, by the package's defaults but for the strength, and what it was fitted to."""
    layer = model.cfg.n_layers // 2
    contrasts = [
        Contrast(request, REFUSALS[kind], CONSENT, label=kind)
        for kind, requests in HARMFUL.items()
        for request in parts(requests)[0]
    ]
    own = collect(model, contrasts, layer=layer, chat=True, progress=False)
    near, general = NEAR_MISSES, [*parts(ORDINARY)[0], *parts(SUMS)[0]]
    alone = {
        "near_misses": collect_queries(model, parts(near)[0], layer=layer, chat=True, progress=False),
        "general": collect_queries(model, general, layer=layer, chat=True, progress=False),
    }
    return fit(own, strength=STRENGTH, **alone), own


def show(model: SteerableModel) -> Shown:
    """Fit, and answer the prompts that nothing was fitted to."""
    steering, _ = fitted(model)
    (layer,) = steering.layers
    told = [(kind, request) for kind, requests in HARMFUL.items() for request in parts(requests)[1]]
    prompts = {HARMFUL_NAME: [request for _, request in told], **{name: parts(one)[1] for name, one in ALONE.items()}}
    every = [prompt for kind in prompts.values() for prompt in kind]
    options = {"max_new_tokens": MAX_NEW_TOKENS, "compare": True, "batch_size": BATCH, "progress": False}
    made = generate(model, every, steering, **options)
    gate = steering.gate_at(layer)
    assert gate is not None
    queries = collect_queries(model, every, layer=layer, chat=True, progress=False).reading(gate.read).queries
    spans, start = {}, 0
    for name, kind in prompts.items():
        spans[name] = slice(start, start + len(kind))
        start += len(kind)
    by_name = {kind: [request for own, request in told if own == kind] for kind in WATCHED} | prompts
    watched = [by_name[name][0] for name in WATCHED]
    return Shown(
        steering,
        {name: made[span] for name, span in spans.items()},
        [kind for kind, _ in told],
        {name: queries[span] for name, span in spans.items()},
        generate(model, watched, steering, replay=True, **options),
    )


def print_shown(console: "Terminal", shown: Shown) -> None:
    """Print six prompts side by side, and what became of each kind of prompt."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Six prompts", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_lines=True)
    for name in ("prompt", "without steering", "steered"):
        table.add_column(name, ratio=1)
    for title, one in shown.examples:
        assert one.baseline is not None
        changed = "" if one.text == one.baseline.text else "bold"
        prompt = Text(f"{title}\n", style="dim").append(str(one.prompt), style="not dim")
        prompt.append(f"\n{decided(shown, one)}", style="dim")
        table.add_row(prompt, Text(one.baseline.text), Text(one.text, style=changed))
    console.tabulate(table)
    table = Table(
        title="What became of prompts that nothing was fitted to", title_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for place, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if place else "left")
    for name in shown.made:
        table.add_row(*shown.row(name))
    console.tabulate(table)
    report = shown.steering.experts_at(shown.layer).report
    assert report is not None
    console.say(f"The fit, held out: {report.held_out}\n")


def decided(shown: Shown, one: Generation) -> str:
    """Gate and experts of one prompt in words."""
    gate, weights = float(one.trace.gate[shown.layer][0]), one.trace.weights[shown.layer][0]
    if gate < SHUT:
        return "gate shut"
    order = weights.argsort(descending=True)[:2].tolist()
    return f"gate {gate:.2f}; " + ", ".join(f"{shown.names[expert]} {weights[expert]:.2f}" for expert in order)


def add_chapter(report: Report, shown: Shown, name: str) -> None:
    """Add what was shown to a report, with the figures of gate and experts."""
    steering, layer = shown.steering, shown.layer
    gate = steering.gate_at(layer)
    assert gate is not None
    report.add_heading(f"A chat model: {name}").add_text(INTRO)
    report.add_table(list(COLUMNS), [shown.row(kind) for kind in shown.made])
    titles = [f"{title}: {decided(shown, one)}" for title, one in shown.examples]
    report.add_heading("Watch it", 3)
    report.add_figure(figures.replay(shown.watched, titles=WATCHED), REPLAY_CAPTION)
    report.add_heading("Six prompts, side by side", 3)
    report.add_figure(
        figures.steer_compare(Generations([one for _, one in shown.examples]), titles=titles), CAPTIONS["compare"]
    )
    report.add_heading("When: the gate", 3)
    alone = torch.cat([shown.queries[kind] for kind in ALONE])
    separation = figures.gate_separation(gate, shown.queries[HARMFUL_NAME], alone, names=(HARMFUL_NAME, "all others"))
    report.add_figure(separation, CAPTIONS["gate"])
    report.add_heading("How: the experts", 3)
    requests = shown.made[HARMFUL_NAME]
    weights = torch.cat([one.trace.weights[layer] for one in requests])
    routing = figures.expert_routing(weights, shown.labels, [str(one.prompt) for one in requests])
    report.add_figure(routing, CAPTIONS["experts"])
