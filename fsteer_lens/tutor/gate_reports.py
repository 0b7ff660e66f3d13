"""The tutor's gates beside other detectors of the same activations: what they miss, and what they open for wrongly."""

from collections.abc import Mapping
from typing import Final

from fsteer_lens.evaluation import gate_reports
from fsteer_lens.evaluation.gate_reports import GATE, GateReport
from fsteer_lens.evaluation.perturbations import PERTURBATIONS, Perturbation, gives_same_answer
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.gates import Gate
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.collecting import collect_queries
from fsteer_lens.tutor.splits import data
from fsteer_lens.tutor.steering import LAYER, activations, fit
from fsteer_lens.tutor.world import chat, user_text

PROBE: Final = "linear probe"
COSINE: Final = "cosine gate"


def fit_gates(
    model: SteerableModel, behaviour: str = "safe", *, gate: Gate | None = None, progress: bool = True
) -> dict[str, Gate]:
    """The tutor's gate, a linear probe and a cosine gate, all from activations of the training split at one layer.

    The last two are told what the first is not: the general training prompts, near misses among them.

    Args:
        model: the tutor.
        behaviour: "safe" or "honest".
        gate: the gate to put beside them, at the behaviour's own layer; None fits the tutor's default.
        progress: show progress bars.

    Raises:
        InputError: an unknown behaviour.
    """
    trained = activations(model, behaviour, progress=progress)
    prompts = [task.prompt for task in data(behaviour).general_train]
    general = collect_queries(model, prompts, layer=trained.layer, batch_size=64, progress=progress).queries
    fitted = (
        gate
        if gate is not None
        else fit(model, behaviour, activations=trained, progress=progress).gate_at(trained.layer)
    )
    assert fitted is not None
    return {
        GATE: fitted,
        PROBE: fit_gate(trained.queries, kind="linear", general=general, false_alarms=None, layer=trained.layer),
        COSINE: fit_gate(trained.queries, kind="cosine", general=general, layer=trained.layer),
    }


def gate_report(
    model: SteerableModel,
    behaviour: str = "safe",
    *,
    gates: Mapping[str, Gate] | None = None,
    false_alarm_rate: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> GateReport:
    """`fsteer_lens.gate_report` on the tutor: gates fitted on train, thresholds from valid, measured on test.

    Groups are new pairs, new templates, general prompts and near misses. Beside `PERTURBATIONS` there is a prefilled
    answer in the tutor's own words, the opening of what it says to one harmful request or myth.

    Args:
        model: the tutor.
        behaviour: "safe" or "honest".
        gates: by name, at the behaviour's own layer; None takes those of `fit_gates`.
        false_alarm_rate, seed, progress: as in `fsteer_lens.gate_report`.

    Raises:
        InputError: an unknown behaviour.
    """
    told = data(behaviour)
    harmful: dict[str, list[str]] = {}
    tasks = {"general": told.general_test, "near misses": told.near_miss_test}
    harmless = {name: [user_text(task.prompt) for task in rows] for name, rows in tasks.items()}
    for kind in ("pair", "template"):
        rows = [*told.general_test, *told.near_miss_test]
        harmful[f"new {kind}s"] = [user_text(one.prompt) for one in told.test if told.heldout(one) == kind]
        harmless[f"new {kind}s"] = [user_text(task.prompt) for task in rows if told.heldout(task) == kind]
    opening = " ".join(told.train[0].undesired.split()[:2])
    return gate_reports.gate_report(
        model,
        fit_gates(model, behaviour, progress=progress) if gates is None else gates,
        harmful,
        harmless,
        layer=LAYER[behaviour],
        calibration=[user_text(task.prompt) for task in (*told.general_valid, *told.near_miss_valid)],
        format=chat,
        perturbations=(*PERTURBATIONS, Perturbation("prefilled, its own words", prefill=opening)),
        keeps=gives_same_answer(model, {user_text(one.prompt): one.undesired for one in told.test}),
        false_alarm_rate=false_alarm_rate,
        seed=seed,
        batch_size=64,
        progress=progress,
    )
