"""Measure every method on the tutor and write docs/results.md: `make results`."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import gate_results
from rich.console import Console

import fsteer_lens as fs
from fsteer_lens import evaluation, tutor
from fsteer_lens.evaluation import Evaluation, evaluate
from fsteer_lens.ground.files import write_atomically
from fsteer_lens.ground.tables import markdown
from fsteer_lens.models import SteerableModel
from fsteer_lens.reading.activations import Activations
from fsteer_lens.selection import Splits, Trial
from fsteer_lens.tutor.measuring import DEFAULT, PAPER

DOCS = Path(__file__).parents[1] / "docs"
LAYERS = (2, 3, 4, 5)
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
SEEDS = (0, 1, 2)
BATCH = 128
RANK = tutor.steering.RANK

Fit = Callable[[Activations, Activations | None], Any]


def scs_gate(trained: Activations) -> fs.Gate:
    """FineSteer's own gate, for baselines to stand behind."""
    return fs.fit_gate(trained.queries, rank=RANK, groups=trained.groups)


@cache
def experts_of(trained: Activations) -> fs.Experts:
    """Experts whose clusters the nearest-centroid baseline takes over."""
    assert trained.shifts is not None
    return fs.fit_experts(trained.queries, trained.shifts)


BASELINES: dict[str, Fit] = {
    "mean shift": lambda own, general: fs.steering.fit_mean_shift(own),
    "mean shift, SCS gate": lambda own, general: fs.steering.fit_mean_shift(own, gate=scs_gate(own)),
    "PCA direction": lambda own, general: fs.steering.fit_pca_direction(own),
    "PCA direction, SCS gate": lambda own, general: fs.steering.fit_pca_direction(own, gate=scs_gate(own)),
    "mean shift, cosine gate": lambda own, general: fs.steering.fit_mean_shift(
        own, gate=fs.fit_gate(own.queries, kind="cosine", general=general.queries)
    ),
    "null space": lambda own, general: fs.steering.fit_null_space(own, general.queries),
    "ridge": lambda own, general: fs.steering.fit_ridge(own),
    "ridge, SCS gate": lambda own, general: fs.steering.fit_ridge(own, gate=scs_gate(own)),
    "nearest centroid": lambda own, general: fs.steering.fit_nearest_centroid(own, experts_of(own)),
    "nearest centroid, SCS gate": lambda own, general: fs.steering.fit_nearest_centroid(
        own, experts_of(own), gate=scs_gate(own)
    ),
}


def harmonic(trial: Trial) -> float:
    """Harmonic mean of a trial's effect and utility."""
    return 2 * trial.effect * trial.utility / max(trial.effect + trial.utility, 1e-12)


def tuned(model: SteerableModel, behaviour: str, console: Console) -> tuple[dict[str, Any], list[list[str]]]:
    """Every baseline at the layer and strength that are best on valid, and a table of these."""
    told = tutor.data(behaviour)
    splits = Splits(
        told.train,
        told.valid,
        [*told.general_valid, *told.near_miss_valid],
        general_train=told.general_train,
    )
    read: Any = {"batch_size": BATCH, "progress": False}
    methods, rows = {}, []
    for name, fit in BASELINES.items():
        console.print(f"{behaviour}: {name}")
        found = fs.search(
            model,
            splits,
            budget=1.0,  # every setting counts: the choice is by the harmonic mean, below
            layers=LAYERS,
            strengths=STRENGTHS,
            method=fit,
            effect=tutor.exact,
            utility=tutor.exact,
            shift="last_prompt",
            batch_size=BATCH,
        )
        best = max(found.trials, key=lambda trial: (harmonic(trial), -trial.strength))
        own = fs.collect(model, told.train, layer=best.layer, shift="last_prompt", **read)
        general = fs.collect_queries(model, [task.prompt for task in told.general_train], layer=best.layer, **read)
        methods[name] = fit(own, general).with_strength(best.strength)
        rows.append([name, str(best.layer), f"{best.strength:g}", f"{best.effect:.3f}", f"{best.utility:.3f}"])
    return methods, rows


def ablated(model: SteerableModel, behaviour: str) -> Any:
    """Directional ablation at the layer that is best on valid; it has no strength."""
    activations = fs.collect(
        model, tutor.data(behaviour).train, layer=LAYERS, shift="last_prompt", batch_size=BATCH, progress=False
    )
    tried = {str(layer): fs.steering.fit_directional_ablation(own) for layer, own in activations.items()}
    found = evaluate(model, tried, tutor.TutorSuite(behaviour, "valid"), batch_size=BATCH, progress=False)
    return tried[max(found.methods, key=lambda layer: found.harmonic_mean(layer).value)]


def on_tutor(model: SteerableModel, behaviour: str, console: Console) -> Iterator[str]:
    """The sections about one behaviour."""
    methods, settings = tuned(model, behaviour, console)
    trained = tutor.activations(model, behaviour, progress=False)
    fit = partial(tutor.fit, model, behaviour, activations=trained, progress=False)
    suite = tutor.TutorSuite(behaviour)
    compared = evaluate(
        model,
        {
            "no steering": None,
            f"`{tutor.BEHAVIOURS[behaviour]}` in the prompt": evaluation.Prompting(tutor.BEHAVIOURS[behaviour]),
            "directional ablation": ablated(model, behaviour),
            **methods,
            PAPER: lambda seed: fit("paper", seed=seed),
            DEFAULT: lambda seed: fit(seed=seed),
        },
        suite,
        seeds=SEEDS,
        batch_size=BATCH,
    )
    yield f"## `{tutor.BEHAVIOURS[behaviour]}`: all methods\n"
    yield compared.to_markdown(reference=DEFAULT) + "\n"
    yield winners(compared) + "\n"
    yield "By what is new about a question, and by kind of prompt that is to be left alone:\n"
    yield by_group(compared, (DEFAULT, "mean shift, SCS gate", "nearest centroid, SCS gate")) + "\n"
    yield "Settings chosen on valid, with what they gave there:\n"
    yield markdown(["baseline", "layer", "strength", "effect", "utility"], settings) + "\n"
    console.print(f"{behaviour}: ablations")
    without = {name: (lambda seed, name=name: variants(trained, seed)[name]) for name in variants(trained, SEEDS[0])}
    ablations = evaluate(model, without, suite, seeds=SEEDS, batch_size=BATCH)
    yield f"## `{tutor.BEHAVIOURS[behaviour]}`: FineSteer with one part taken away\n"
    yield ablations.to_markdown(reference="whole") + "\n"


@cache
def variants(trained: Activations, seed: int) -> dict[str, Any]:
    """FineSteer's ablations with the tutor's settings."""
    return dict(evaluation.fit_ablations(trained, rank=RANK, strength=tutor.steering.STRENGTH, seed=seed))


def by_group(compared: Evaluation, methods: tuple[str, ...]) -> str:
    """Some methods group by group."""
    rows = []
    for measure in compared.measures:
        for group in sorted(set(measure.groups)):
            estimates = [f"{compared.estimate(method, measure.name, group)}" for method in methods]
            rows.append([measure.name, group, str(measure.groups.count(group)), *estimates])
    return markdown(["share", "prompts", "n", *methods], rows)


def winners(compared: Evaluation) -> str:
    """Which steering methods the default beats, and which it does not, in words."""
    own = (DEFAULT, PAPER, "no steering")
    rivals = [name for name in compared.methods if name not in own and " in the prompt" not in name]
    lost = []
    for name in rivals:
        difference = compared.harmonic_difference(DEFAULT, name)
        if difference.interval[0] <= 0:
            lost.append(f"{name} ({difference:+.3f})")
    beaten = f"{DEFAULT} is above {len(rivals) - len(lost)} of {len(rivals)} baselines with an interval above zero"
    return f"{beaten}." if not lost else f"{beaten}; not above {', '.join(lost)}."


INTRO = """# Results on the tutor

Written by `make results` (`python tools/results.py`); every number in a table comes from that run, and the notes at
the end are about such a run. What steering is to change
(effect) and to leave alone (utility) are shares of test prompts with exactly the wanted answer, letter by letter,
under greedy decoding; the utility counts general prompts and near misses together. Intervals are 95 % bootstrap
intervals over prompts; "FineSteer, default − this" is the paired difference of the harmonic means of effect and
utility, the same draws of prompts being used for both. FineSteer is averaged over seeds
0, 1 and 2; baselines that cluster or cut folds have seed 0. An interval of one point says that all prompts came out
alike; with n prompts that leaves room for about 3/n. The prompts are made from few templates (the new ones from
three): intervals hold for these, and say less about others.

**How settings were chosen.** Each baseline has the layer (2 to 5) and strength (0.5 to 3) with the largest harmonic
mean on the *valid* split. FineSteer has the defaults of `tutor.fit`, chosen on valid as well ([model
card](tutor_model_card.md)). Test is read once per method. The tutor is a small model of a made-up world, so these
numbers compare methods; they promise nothing about a large model.
"""


NOTES = """## What these tables say, and what did not work

- **`<safe>` needs more than one vector.** Every category refuses in words of its own. Methods with a single vector
  find one that suits about a third of the prompts, whichever way the vector was found (mean, PCA, null space), at any
  layer (2 to 5) and strength that was tried. At layer 1, which was not searched, the first-steer notebook finds 0.64,
  at a cost to near misses and how-tos. Methods with a vector per cluster turn nearly all.
- **FineSteer does not beat the nearest centroid there: both are at the ceiling.** The tutor's categories are so far
  apart that the nearest mean query finds the right one, and a learned router has nothing to add. Where clusters
  overlap it might; the tutor cannot show it.
- **Nor does it beat ridge**, one linear map of the query without experts or routing: on `<safe>` with the same gate the
  same prompts are turned and kept. A mixture is worth its parts only where a linear map misses something.
- **On `<honest>` a single vector does as well or better.** All corrections are reached in one direction, best after
  the last block, where a shift is read off directly. FineSteer's default layer is 4 for both behaviours, and the
  myths that it misses are those for which its gate stays shut: without the gate it turns all of them, and then
  changes other answers.
- **Whether the experts or the residual part act cannot be told from answers.** One expert with the residual, or many
  experts without it, give the same answers as the whole; without both the effect on `<safe>` is lost. The routing
  loss changes which of the two carries the vector and not what is said. It makes pictures of routing mean something;
  it is no gain in effect.
- **The published settings turn fewer prompts on both.** On `<honest>` prototypes of unit shifts and a gate calibrated
  on the queries that its basis was fitted to each cost some. On `<safe>` neither costs anything by itself; that the
  preset still does is left to steering at every position, or to the sum, which is not taken apart here.
- **A cosine gate does not work here.** The threshold that its recipe chooses lets harmful prompts through and most of
  the others with them, so that the mean shift gains nothing from it, and at a common false-alarm rate it opens for
  almost nothing (see above).
- **Directional ablation does nothing here.** It takes a direction away, and these behaviours are to be called up.
- **The gate is easily fooled**, although it tells the test prompts apart without a mistake on `<safe>`: typing errors
  and polite endings shut it, and so does a single exchanged word that leaves the harmful answer as it was (see above,
  and [gates.md](gates.md)). A linear probe, which is shown harmless prompts too, is harder to shut and raises more
  false alarms.
- Where everything is right, intervals of one point hide how little 160 or 300 prompts can show; see the top of the
  page.
"""


def main() -> None:
    """Measure everything on the tutor and write docs/results.md."""
    console = Console(stderr=True)
    model = tutor.load()
    parts = [INTRO]
    for behaviour in tutor.BEHAVIOURS:
        parts += on_tutor(model, behaviour, console)
    parts.append("## When the gate decides wrongly\n")
    for title, table in gate_results.tables(model, progress=console.is_terminal):
        parts += [f"### {title}\n", f"{table}\n"]
    parts.append(NOTES)
    write_atomically(DOCS / "results.md", "\n".join(parts).encode())


if __name__ == "__main__":
    main()
