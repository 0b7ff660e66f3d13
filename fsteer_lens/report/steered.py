"""A report of what one steering did to a model: table, figures, texts, trace, settings."""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Unpack

import torch
from torch import Tensor

from fsteer_lens import effects, figures
from fsteer_lens.effects.answers import margins_of_each
from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import instance, options_of, seed_of, switch, whole
from fsteer_lens.ground.estimates import Proportion, bootstrap
from fsteer_lens.ground.spread import every
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.method.gates import OPEN
from fsteer_lens.method.subspace_gates import subspace_leaves
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompt_text, prompts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.reader import read_prompts
from fsteer_lens.report.page import Report
from fsteer_lens.report.settings import add_settings, machine_rows, steering_rows
from fsteer_lens.report.trust import add_trust
from fsteer_lens.run.generation import Generation, Generations, generate
from fsteer_lens.run.replaying import MOST_TOKENS
from fsteer_lens.steering.steering import FineSteer, Steering

GENERAL: Final = "general prompts"
UNLABELLED: Final = "to steer"
COLUMNS: Final = (
    "prompts", "text changed", "gate open", "KL (nats per token)", "number", "margin without", "margin with steering",
)  # fmt: skip
FIRST: Final = 4
"""As many of these columns are told first; the rest is folded."""
MEASURED: Final = (
    "A share is given with its 95 % Wilson interval, a mean with its 95 % bootstrap interval. KL(steered ‖ unsteered) "
    "tells how far each token's distribution moved. The margin is the mean log-probability per token of the preferred "
    "answer minus that of the undesired one, in nats, with both answers given: above zero the model prefers what is "
    "wanted."
)

REPLAYED: Final = 4
MEASURED_AGAIN: Final = 24
"""Contrasts, and as many general prompts, that are run again at other strengths and without each expert."""

REPLAY_CAPTION: Final = (
    "A column is a token. Choose one by a click or with the arrow keys, or play the answer: below it stands what "
    "happened there."
)
CAPTIONS: Final = {
    "compare": "The same prompts without and with steering. The stronger a word's shade, the further its distribution "
    "moved; point at it for the likeliest words on both sides.",
    "separation": "What the gate looks at, for each prompt (a gate on a subspace: how much of the activation lies "
    "in it); the dashed line is where it opens.",
    "each": "The same for every prompt: what is missed, and what is steered by mistake, stands at the ends of a group.",
    "ranks": "Drag the slider to give the subspace more directions: who would be steered then?",
    "scree": "What each direction adds, and at which rank the two kinds of prompt are told apart.",
    "carried": "Which tokens of one prompt carried its energy ratio: how much it falls (blue) or rises (red) when the "
    "token is left out. Parts of tokens do not add up.",
    "routing": "Which expert's direction was used for which prompt.",
    "knockout": "The same experts taken out one by one, at this layer alone. A large weight may be habit; a loss shows "
    "that it matters.",
    "geometry": "Cosines between the experts' prototypes.",
    "position": "Size of the steering change in the residual stream after each layer and at each token of one answer.",
    "strength": "The same prompts at other strengths, by the probabilities of the given answers: nothing is generated. "
    "Utility and distance are measured on the general prompts, at the first token of an answer.",
}


@dataclass(frozen=True)
class _Reporting(Passes):
    """Many answers are generated: on a CPU 32 rows take hardly more time a token than 16."""

    batch_size: int = 32


def steering_report(
    model: SteerableModel,
    steering: Steering,
    contrasts: Iterable[Contrast],
    general: GivenPrompts = (),
    *,
    title: str = "What steering did",
    max_new_tokens: int = 32,
    seed: int = 0,
    examples: int = 8,
    sweep: bool = True,
    **options: Unpack[PassOptions],
) -> Report:
    """Generate with and without steering, measure, draw, and put it all into one page.

    Args:
        model: the model that the steering was fitted on.
        steering: a FineSteer or a baseline.
        contrasts: prompts to be steered, best ones that the fit did not see, with both answers.
        general: prompts to be left alone; without them, nothing is said about what steering costs.
        title: of the page.
        max_new_tokens: tokens per answer at most.
        seed: of the bootstrap intervals; texts are greedy.
        examples: prompts to show side by side; all of them are in a table further down.
        sweep: measure ten strengths too, by teacher forcing, on at most 24 contrasts and 24 general prompts, evenly
            spread; needs general prompts.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how prompts become
            tokens, see `tokens.prompt_ids`; `batch_size` (32), rows per forward pass; `progress` (True), show progress
            bars.

    Returns:
        The page; `.write(path)` writes it.

    Raises:
        InputError: no contrasts, or a hook object that is no steering.
        ContextLengthError, MismatchError: as in `generate`.
    """
    passes = options_of("steering_report", _Reporting, options)
    fix = "Report on each link of a chain by itself."
    instance("steering", steering, Steering, "a FineSteer or a baseline", fix=fix)
    contrasts, general = ContrastSet(contrasts), prompts_of(general, "general prompt", least=0)
    if not contrasts:
        raise InputError("steering_report", expected="at least one contrast", got="none")
    max_new_tokens, examples = whole("max_new_tokens", max_new_tokens, 1), whole("examples", examples, 1)
    seed, sweep = seed_of(seed), switch("sweep", sweep)
    prompts = contrasts.prompts + general
    labels = [contrast.label or UNLABELLED for contrast in contrasts]
    others = GENERAL
    while others in labels:
        others += " (to be left alone)"
    groups = labels + [others] * len(general)
    passes = passes.following(remembered(steering), model, prompts)
    made = generate(model, prompts, steering, max_new_tokens=max_new_tokens, compare=True, **passes.options)
    report = Report(title)
    _add_replay(report, model, steering, made, groups, passes)
    columns, rows = _table(model, steering, contrasts, made, groups, passes, seed)
    report.add_text(_headline(made, len(contrasts))).add_table(columns[:FIRST], [row[:FIRST] for row in rows])
    report.add_table(columns, rows, folded="All that was measured, with intervals", about=MEASURED)
    chosen = _examples(made, groups, examples)
    report.add_figure(
        figures.steer_compare(
            Generations(made[index] for index in chosen), limit=None, titles=[groups[index] for index in chosen]
        ),
        CAPTIONS["compare"],
    )
    most = max(range(len(contrasts)), key=lambda index: float(_kl(made[index]).sum()))
    read = read_prompts(model, prompts, passes, steering.hooked_layers, steering.reads, site=steering.site)
    for layer in steering.hooked_layers:
        where = "" if len(steering.hooked_layers) == 1 else f", layer {layer}"
        gate = steering.gate_at(layer)
        asked = read[steering.read if gate is None else gate.read][layer]
        _add_gate(report, model, steering, layer, where, asked, prompts, len(contrasts), most, passes)
        opened = made[: len(contrasts)]
        _add_experts(report, model, steering, layer, where, read[steering.read][layer], contrasts, opened, passes)
    _add_generation(report, model, steering, made, most, passes)
    if sweep and len(general):
        methods: dict[str, Steering] = {"as it is": steering}
        if isinstance(steering, FineSteer) and steering.gate is not None:
            methods["without its gate"] = steering.with_gate(None)
        some = [every(items, MEASURED_AGAIN) for items in (contrasts, general)]
        found = effects.strength_sweep(model, methods, *some, seed=seed, **passes.options)
        caption = CAPTIONS["strength"] + _spread(max(len(contrasts), len(general)))
        report.add_heading("How much: strength").add_figure(figures.strength_sweep(found), caption)
    _add_texts(report, made, groups)
    settings = {"answers": f"greedy, at most {max_new_tokens} tokens", "chat template": bool(passes.chat), "seed": seed}
    add_settings(report, [*machine_rows(), *([k, str(v)] for k, v in settings.items()), *steering_rows(steering)])
    return report


def _spread(count: int) -> str:
    """What is said below a figure for which not all prompts were run again."""
    return f" At most {MEASURED_AGAIN} of a kind were run again, evenly spread." if count > MEASURED_AGAIN else ""


def _kl(item: Generation) -> Tensor:
    assert item.trace.steps is not None and item.trace.steps.kl is not None
    return item.trace.steps.kl[0]


def _changed(item: Generation) -> bool:
    assert item.baseline is not None
    return item.text != item.baseline.text


def _gate(item: Generation) -> float:
    """The largest gate value over the layers."""
    return max(float(value[0]) for value in item.trace.gate.values())


def _share(hits: Sequence[bool]) -> str:
    share = Proportion(sum(hits), len(hits))
    low, high = share.interval
    return f"{share.value:.2f}\n{low:.2f} to {high:.2f}"


def _mean(values: Tensor, seed: int) -> str:
    estimate = bootstrap(values, seed=seed)
    return f"{estimate.value:.3f}\n{estimate.interval[0]:.3f} to {estimate.interval[1]:.3f}"


def _table(
    model: SteerableModel,
    steering: Steering,
    contrasts: Sequence[Contrast],
    made: Generations,
    groups: Sequence[str],
    passes: Passes,
    seed: int,
) -> tuple[list[str], list[list[str]]]:
    """A row per group of prompts; shares with Wilson intervals, means with bootstrap intervals, 95 % each."""
    margins = margins_of_each(model, [None, steering], contrasts, **passes.batching)
    rows = []
    for group in dict.fromkeys(groups):
        own = [index for index, name in enumerate(groups) if name == group]
        items = [made[index] for index in own]
        answered = ["–", "–"] if own[0] >= len(contrasts) else [_mean(margin[own], seed) for margin in margins]
        kl = torch.stack([_kl(item).mean() for item in items])
        open_ = [_gate(item) >= OPEN for item in items]
        rows.append(
            [group, _share(list(map(_changed, items))), _share(open_), _mean(kl, seed), str(len(own)), *answered]
        )
    return list(COLUMNS), rows


def _headline(made: Generations, n_contrasts: int) -> str:
    """What steering did, in one sentence."""

    def told(items: Sequence[Generation]) -> str:
        return f"{sum(map(_changed, items))} of {len(items)}"

    kept = f", and of {told(made[n_contrasts:])} general ones" if len(made) > n_contrasts else ""
    return f"Steering changed the text of {told(made[:n_contrasts])} prompts that it is for{kept}."


def _examples(made: Generations, groups: Sequence[str], limit: int) -> list[int]:
    """Prompts to show: of each group in turn, the last one first, and in each the ones that changed most."""
    order = sorted(range(len(made)), key=lambda index: -float(_kl(made[index]).sum()))
    names = dict.fromkeys([groups[-1], *groups])
    queues = {group: [index for index in order if groups[index] == group] for group in names}
    turns = [queue[turn] for turn in range(min(limit, len(made))) for queue in queues.values() if turn < len(queue)]
    return sorted(turns[:limit])


def _add_replay(
    report: Report,
    model: SteerableModel,
    steering: Steering,
    made: Generations,
    groups: Sequence[str],
    passes: Passes,
) -> None:
    """Some answers, to be watched token by token."""
    chosen = _examples(made, groups, REPLAYED)
    longest = min(max(len(made[index].tokens) for index in chosen), MOST_TOKENS)
    prompts = [made[index].prompt for index in chosen]
    told = generate(model, prompts, steering, max_new_tokens=longest, compare=True, replay=True, **passes.options)
    view = figures.replay(told, titles=[groups[index] for index in chosen])
    report.add_heading("Watch it").add_figure(view, REPLAY_CAPTION)


def _add_gate(
    report: Report,
    model: SteerableModel,
    steering: Steering,
    layer: int,
    where: str,
    queries: Tensor,
    prompts: Sequence[Prompt],
    n_contrasts: int,
    example: int,
    passes: Passes,
) -> None:
    gate = steering.gate_at(layer)
    if gate is None:
        return
    report.add_heading(f"When: the gate{where}")
    parts = {UNLABELLED: slice(0, n_contrasts)}
    if len(prompts) > n_contrasts:
        parts[GENERAL] = slice(n_contrasts, None)
    by_group = {name: queries[part] for name, part in parts.items()}
    single = gate.leaves == (gate,)
    if GENERAL in by_group and single:
        figure = figures.gate_separation(gate, *by_group.values(), names=(UNLABELLED, GENERAL))
        report.add_figure(figure, CAPTIONS["separation"])
    if single:
        each = {name: prompts[part] for name, part in parts.items()}
        report.add_figure(figures.gate_per_prompt(gate, by_group, each), CAPTIONS["each"])
    if not gate.ranks:
        return
    by_rank = None
    if GENERAL in by_group:
        by_rank = effects.rank_sweep(gate, by_group[UNLABELLED], by_group[GENERAL])
    shown = {name: prompts[part] for name, part in parts.items()}
    report.add_figure(figures.rank_explorer(gate, by_group, shown), CAPTIONS["ranks"])
    first = subspace_leaves(gate)[0]
    cut = first.subspace.at_rank(gate.ranks)
    report.add_figure(figures.scree(cut, by_rank, rank=min(first.rank, gate.ranks)), CAPTIONS["scree"])
    if single:
        found = effects.explain_gate(model, steering, prompts[example], layer=layer, **passes.batching)
        report.add_figure(figures.token_scores(found), CAPTIONS["carried"])


def _add_experts(
    report: Report,
    model: SteerableModel,
    steering: Steering,
    layer: int,
    where: str,
    queries: Tensor,
    contrasts: Sequence[Contrast],
    made: Sequence[Generation],
    passes: Passes,
) -> None:
    if not isinstance(steering, FineSteer) or layer not in steering.layers:
        return
    experts = steering.experts_at(layer)
    report.add_heading(f"How: the experts{where}")
    if experts.report is not None:
        add_trust(report, experts.report, experts.n_experts)
    labels = [contrast.label or UNLABELLED for contrast in contrasts]
    prompts = [contrast.prompt for contrast in contrasts]
    opened = torch.stack([one.trace.gate[layer][0] for one in made])
    weights = experts.route(queries[: len(contrasts)])
    routing = figures.expert_routing(weights, labels, prompts, gate=opened, names=experts.names)
    report.add_figure(routing, CAPTIONS["routing"])
    if sum(experts.enabled) > 1:
        chosen = every(range(len(contrasts)), MEASURED_AGAIN)
        some = [contrasts[index] for index in chosen]
        found = effects.expert_knockout(model, steering, some, layer=layer, queries=queries[chosen], **passes.options)
        report.add_figure(figures.expert_knockout(found), CAPTIONS["knockout"] + _spread(len(contrasts)))
    report.add_figure(figures.expert_geometry(experts), CAPTIONS["geometry"])


def _add_generation(
    report: Report, model: SteerableModel, steering: Steering, made: Generations, example: int, passes: Passes
) -> None:
    """One answer from the inside."""
    item = made[example]
    report.add_heading("Inside generation")
    path = effects.propagation(model, steering, item.prompt, item.tokens, **passes.formatting)
    report.add_figure(figures.layer_position(path), CAPTIONS["position"])


def _add_texts(report: Report, made: Generations, groups: Sequence[str]) -> None:
    """Every text, folded, and the trace to take away."""
    rows = []
    for item, group in zip(made, groups, strict=True):
        assert item.baseline is not None
        kl = f"{float(_kl(item).mean()):.3f}"
        rows.append([prompt_text(item.prompt), group, item.baseline.text, item.text, f"{_gate(item):.2f}", kl])
    columns = ["prompt", "group", "without steering", "steered", "gate", "KL (nats per token)"]
    report.add_heading("Every text and the trace")
    report.add_table(columns, rows, words=True, folded=f"All {len(rows)} prompts with both texts")
    report.add_download(
        "The whole trace, as JSON lines: Trace.from_jsonl reads it, and every figure draws from it without the model.",
        "trace.jsonl.gz",
        gzip.compress(made.trace.json_lines().encode(), mtime=0),
    )
