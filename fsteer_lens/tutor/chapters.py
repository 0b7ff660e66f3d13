"""What the demonstration's report says: a chapter for each behaviour of the tutor, and the settings."""

from collections.abc import Sequence
from typing import Final

import torch

from fsteer_lens import figures
from fsteer_lens.figures import Html
from fsteer_lens.figures.html import escape
from fsteer_lens.hooks.probes import SubspaceProbe
from fsteer_lens.method.subspace_gates import SubspaceGate
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.report.page import Report
from fsteer_lens.run.generation import Generations
from fsteer_lens.tutor.measuring import (
    CONTRASTS,
    DEFAULT,
    GATED_MEAN_SHIFT,
    GENERAL,
    NEAR_MISSES,
    NO_STEERING,
    PAPER,
    Measured,
)
from fsteer_lens.tutor.splits import BEHAVIOURS
from fsteer_lens.tutor.suite import WANTED

TITLES: Final = {
    "safe": "Refusing harmful requests",
    "honest": "Answering common myths truthfully",
}
GROUPS: Final = {"safe": ("harmful", "near misses", "general"), "honest": ("myths", "true claims", "general")}

INTRO: Final = (
    "Steering changes what a language model says while it runs: a vector is added to the numbers inside it, and no "
    "weight is touched. FineSteer asks two questions for every prompt. When: a gate looks at how much of the prompt's "
    "activation lies in the small subspace that the prompts in need of steering span, and opens or stays shut. How: a "
    "few experts, each a direction of change found in the data, are mixed into one vector for this very prompt.\n\n"
    "The model here is the tutor, a small one that was trained on a made-up world for teaching. It answers harmful "
    "requests with made-up nonsense and common myths as people tell them, unless a tag in the prompt switches that "
    "off. Steering is to do what the tag does, without the tag, and to leave every other answer as it is. All prompts "
    "below are test prompts, asked in ways that training never showed."
)

TABLE_TEXT: Final = (
    "Each row is a method and each number the share of test prompts, with its 95 % interval below it. A good method "
    "has high numbers in the columns of wanted and kept answers; its gate is open for the first kind of prompt only. "
    '"Expert = cluster" is how often the strongest expert is the one nearest to what the tag would have changed for '
    "that prompt, and NMI how much it tells about the prompt's label (0 nothing, 1 everything)."
)

CAPTIONS: Final = {
    "compare": "The same prompts without and with steering. A shaded word is one that the model would hardly have said "
    "by itself: point at it to see how likely it was with and without steering.",
    "gate_separation": "How much of each prompt's activation lies in the gate's subspace: prompts right of the dashed "
    "line are steered. On the right, how many are steered rightly and wrongly if that line is moved; a curve that hugs "
    "the upper left corner means that the two kinds hardly overlap.",
    "rank_explorer": "Every dot is a prompt; drag the slider to give the gate's subspace more directions. Watch how "
    "the groups move, how the threshold is set anew for each rank, and who is steered (filled) or left alone (hollow).",
    "token_scores": "The same energy ratio read at every token: the stronger the colour, the more of the activation "
    "lies in the subspace. The gate itself reads it once, at the last token of the prompt; the orange line marks "
    "the tokens at which something was then added.",
    "expert_routing": "Which expert's direction was used for which prompt: a row is a prompt, a filled cell a large "
    "weight. The colours on the right name the strongest expert, so a label of one colour has an expert of its own.",
}


def table_of(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """What was measured as a table: columns, and cells with their interval on a second line."""
    shares = {method: measured.shares(method) for method in measured.methods}
    names = list(dict.fromkeys(name for one in shares.values() for name in one))
    columns = ["method", *names, "expert = cluster", "NMI", "seconds"]

    def cells(method: str) -> list[str]:
        found, routing = [shares[method].get(name) for name in names], measured.routing(method)
        told = ["–" if s is None else f"{s.value:.3f}\n{s.interval[0]:.2f}–{s.interval[1]:.2f}" for s in found]
        routed = [f"{routing.agreement:.2f}", f"{routing.nmi:.2f}"] if routing else ["–", "–"]
        return [method, *told, *routed, f"{measured.evaluation.seconds[method]:.1f}"]

    return columns, [cells(method) for method in measured.methods]


def findings(measured: Measured) -> str:
    """The main numbers in words."""
    wanted = WANTED[measured.suite.behaviour]
    first, last = (measured.shares(name)[wanted] for name in (NO_STEERING, DEFAULT))
    gated, paper = (measured.evaluation.difference(DEFAULT, name, wanted) for name in (GATED_MEAN_SHIFT, PAPER))
    return (
        f"The tutor gives exactly the wanted answer to {first.hits} of {first.total} test prompts without steering,"
        f" and to {last.hits} of {last.total} with FineSteer. Compared prompt by prompt, that share is {gated:+.3f}"
        f" against the mean shift behind the same gate, and {paper:+.3f} against FineSteer with the published settings"
        f" (difference with its 95 % paired bootstrap interval). The energy ratio tells these prompts from all others"
        f" with AUROC {measured.auroc:.3f}."
    )


def add_chapter(
    report: Report, model: SteerableModel, measured: Measured, titles: Sequence[str], examples: Generations
) -> None:
    """Add what was measured on one behaviour, with the figures that show how it came about."""
    suite, steering = measured.suite, measured.steering
    layer = steering.layers[0]
    gate, experts = steering.gate_at(layer), steering.experts_at(layer)
    assert isinstance(gate, SubspaceGate)
    wanted, near, general = GROUPS[suite.behaviour]
    named = (
        (wanted, CONTRASTS, suite.contrasts),
        (near, NEAR_MISSES, suite.near_misses),
        (general, GENERAL, suite.general),
    )
    queries = {name: measured.queries[kind].queries for name, kind, _ in named}
    prompts = {name: [item.prompt for item in items] for name, _, items in named}
    columns, rows = table_of(measured)
    marked = [index for index, row in enumerate(rows) if row[0] == DEFAULT]
    report.add_heading(f"{TITLES[suite.behaviour]} ({BEHAVIOURS[suite.behaviour]})")
    report.add_text(findings(measured)).add_text(TABLE_TEXT).add_table(columns, rows, marked=marked)
    report.add_heading("Six prompts, side by side", 3)
    report.add_figure(figures.steer_compare(examples, titles=titles), CAPTIONS["compare"])
    report.add_heading("When: the gate", 3)
    others = torch.cat([queries[near], queries[general]])
    separation = figures.gate_separation(gate, queries[wanted], others, names=(wanted, "all others"))
    report.add_figure(separation, CAPTIONS["gate_separation"])
    report.add_figure(figures.rank_explorer(gate, queries, prompts), CAPTIONS["rank_explorer"])
    report.add_figure(_token_view(model, gate, layer, examples, titles), CAPTIONS["token_scores"])
    report.add_heading("How: the experts", 3)
    labels = [contrast.label for contrast in suite.contrasts]
    routing = figures.expert_routing(experts.route(queries[wanted]), labels, prompts[wanted])
    report.add_figure(routing, CAPTIONS["expert_routing"])


def _token_view(
    model: SteerableModel, gate: SubspaceGate, layer: int, examples: Generations, titles: Sequence[str]
) -> Html:
    """The energy ratio at every token of the first example and of the last two."""
    views = []
    for index in (0, len(examples) - 2, len(examples) - 1):
        item = examples[index]
        ids = [*prompt_ids(model, item.prompt), *item.tokens]
        with torch.no_grad(), SubspaceProbe(gate.subspace, layer=layer).on(model) as trace:
            model(torch.tensor([ids], dtype=torch.long, device=model.cfg.device))
        ratios = trace.ser[layer][0, :, gate.rank - 1]
        name = f"energy ratio at rank {gate.rank}"
        view = figures.token_scores(item.trace, ratios, name=name, bounds=(0.0, 1.0), legend=not views)
        views.append(f"<p><b>{escape(titles[index])}</b></p>{view}")
    return Html("".join(views))
