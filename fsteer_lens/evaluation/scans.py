"""Calibrating a gate that scans windows of a prompt: on the same windows, of prompts to be left alone."""

from collections.abc import Iterable
from typing import Unpack

from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.gate_reports import read_by, threshold_at_rate
from fsteer_lens.evaluation.perturbations import Format
from fsteer_lens.ground.checks import function, options_of
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.linalg import require_matrix
from fsteer_lens.method.scan_gates import ScanGate
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import texts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.collecting import READING
from fsteer_lens.reading.scanning import scan_prompts
from fsteer_lens.steering.steering import Steering

MARK = "zq0xkwv"
"""A word that stands for what a person says, to see what a format puts around it."""


def fit_scan(
    model: SteerableModel,
    gate: Gate | Steering,
    general: Iterable[str],
    *,
    false_alarms: float = 0.05,
    format: Format | None = None,
    layer: int | None = None,
    **options: Unpack[PassOptions],
) -> ScanGate:
    """A gate that scores windows of a prompt, the whole, its sentences and its beginnings, and takes the maximum.

    Each window is a prompt of its own: a user's turn in a chat, the same text format otherwise. Prompts that are led
    past the gate by what is put in front of a request or behind it are caught so. What changes the words of the request
    itself is not: `attack_gate` shuts this gate too.

    The maximum over many windows is larger than one score, so the gate is cut at the false-alarm rate of the maxima
    over `general`: of new prompts like these at most `false_alarms` open it, see `threshold_at_rate`. Its price is a
    pass, up to the gate's layer, over 16 windows of each prompt at most: 4 to 8 times its own tokens.

    Args:
        model: what the gate was fitted on.
        gate: whose score to take; a steering stands for its gate, and is followed in how texts become tokens.
        general: texts to be left alone, as a person types them, which nothing was fitted to; near misses belong here.
        false_alarms: in (0, 1).
        format: from what a person types to model input; None takes the text itself, or the user's turn of a chat. What
            it puts around a text is found again in the prompts that the gate will see.
        layer: where the gate reads; None where it knows that itself.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted, else as in `generate`),
            how texts become tokens; `batch_size` (16), windows per forward pass; `progress` (True), show a progress
            bar.

    Raises:
        InputError: too few texts for this rate, a format that does not keep a text in one piece, or no gate.
        ContextLengthError: a prompt does not fit into the context.
    """
    run = options_of("fit_scan", Passes, options).following(remembered(gate), model)
    named, where = read_by({"scanned": gate}, layer)
    given = named["scanned"]
    inner = given.inner if isinstance(given, ScanGate) else given
    scanning = ScanGate(inner, 0.0, *around(format))
    texts = texts_of(general, "general text")
    prompts = texts if format is None else [format(text) for text in texts]
    with run.bar(len(prompts), READING) as advance:
        h = require_matrix(scan_prompts(model, scanning, prompts, run, where, advance), f"activations at layer {where}")
    cut = threshold_at_rate(inner, false_alarms, h)
    return ScanGate(inner, cut, scanning.before, scanning.after)


def around(format: Format | None) -> tuple[str, str]:
    """What a format puts before and after a text.

    Raises:
        InputError: it does not keep the text in one piece.
    """
    if format is None:
        return "", ""
    made = function("format", format)(MARK)
    before, found, after = made.partition(MARK) if isinstance(made, str) else ("", "", "")
    if not found or MARK in after:
        raise InputError("format", expected="a function that puts something around a text", got=repr(made)[:60])
    return before, after
