"""A real chat model, SmolLM2-135M-Instruct, from loading to calibrating, beside plain ways of doing the same."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from operator import eq
from typing import Any

import torch

from benchmarks import collecting, decode, scoring
from benchmarks.measuring import Aim, Kept, Ratio, Row, Section, Settings, compare, peak_memory
from fsteer_lens import Contrast, FineSteer, collect, collect_queries, fit, generate, models
from fsteer_lens.demo.requests import CONSENT, HARMFUL, ORDINARY, REFUSALS
from fsteer_lens.evaluation import TruthfulQA
from fsteer_lens.evaluation.truthfulness import Choice
from fsteer_lens.models.loading import SMOLLM2
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.teacher_forcing import answered

TITLE = "A real chat model"
FITTED = 12
"""Requests that a steering is fitted to."""
GENERAL = 20
"""Ordinary prompts that the gate is fitted to; those after them are calibrated on."""


def run(settings: Settings) -> Section:
    """Loading on every class, then what is done with the model; a quick run has the first class, and loads once."""
    if any(find_spec(package) is None for package in (SMOLLM2[0], "gguf")):
        note = "The package of SmolLM2 is not installed: see requirements-smollm2.lock."
        return Section(TITLE, "", (Row("all", "plain / ours", None, note=note),))
    kinds = models.available_kinds()
    reference, tokenizer = plain_reading(settings.device)
    rows = [] if settings.quick else loading(settings)
    for kind in kinds[:1] if settings.quick else kinds:
        model = models.from_hf(deepcopy(reference), tokenizer, kind)
        rows += using(models.CLASS_NAMES[kind], reference, model, settings)
    n_contrasts, n_new, n_asked = sizes(settings)
    text = f"""
SmolLM2-135M-Instruct in float32, from the 4-bit file that `models.load("smollm2")` reads, on short prompts that the
package ships, each a user's turn of the model's chat template. Plain reading is transformers' `from_pretrained` of that
file, model and tokenizer; `load` makes an ordinary model of it, converts that, and compares what both say.
{n_contrasts} requests with a refusal and a consent are collected, a third and half of the way up, beside the plain
recipe of "Collecting": all prompts begin with the same system message here, which `collect` runs once and
"multiplications alone" does not know of.
A steering is fitted to {FITTED}, its gate to {GENERAL} ordinary prompts as well. After one of the requests {n_new}
tokens are generated, greedily and with a KV cache, beside transformers' own `generate`; how much of the difference is
the class's, its own `generate` tells. The rest is as in "Scoring answers": the bare model and three methods choose
among four refusals, of which one is of the request's kind, for {n_asked} requests; and KL is measured on an answer
to each of {n_asked} ordinary prompts, without the gate, which would be shut there.
""".strip()
    return Section(TITLE, text, tuple(rows))


def sizes(settings: Settings) -> tuple[int, int, int]:
    """How many contrasts, new tokens, and prompts with answers to score."""
    return (1, 2, 1) if settings.quick else (12, 16, 2)


def plain_reading(device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of the file as transformers reads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package, file = SMOLLM2
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    where: Any = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": file}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(**where)


def loading(settings: Settings) -> list[Row]:
    """Time and peak of memory of `load` on every class, over those of plain reading."""
    rows = []
    plain_peak = peak_memory(loading_in_child, None)
    for kind in models.available_kinds():
        name = models.CLASS_NAMES[kind]
        ratio = compare(
            partial(plain_reading, settings.device),
            partial(models.load, "smollm2", kind, settings.device),
            rounds=settings.rounds_or(1),
            warmup=0,
        )
        peak = peak_memory(loading_in_child, kind)
        grown = Ratio((peak / plain_peak,), plain_peak, peak, unit="MiB")
        rows += [
            Row(f"{name}, loading", "load / plain reading", ratio),
            Row(f"{name}, memory", "peak of load / of plain reading", grown),
        ]
    return rows


def loading_in_child(kind: models.Kind | None) -> Callable[[], object]:
    """The call that loads the model as this class, or reads it plainly; what it imports is there before."""
    models.available_kinds()
    return plain_reading if kind is None else partial(models.load, "smollm2", kind)


def using(name: str, reference: Any, model: Any, settings: Settings) -> list[Row]:
    """Collecting, generating, choosing and calibrating on one class of model."""
    (n_contrasts, n_new, n_asked), rounds = sizes(settings), settings.rounds_or(2)
    read = contrasts(model, n_contrasts)
    steering = fitted(model).to(settings.device)
    third, half = model.cfg.n_layers // 3, steering.layers[0]
    rows = [
        collecting.row(f"{name}, collecting at layer {layer}", reference, model, read, layer, rounds, aim)
        for layer, aim in ((third, Aim(8, at_least=True)), (half, None))
    ]
    for what, ratio, same in generating(reference, model, read[0].prompt, steering, n_new, settings.rounds_or(3)):
        note = f"{same} of {n_new} tokens are the same."
        rows.append(Row(f"{name}, {what}", "ours / transformers' generate", ratio, note=note))
    ungated = steering.with_gate(None)
    for what, ratio, error in (
        ("MC1 and MC2", *scoring.choosing(model, steering, suite(n_asked), rounds, chat=True)),
        ("KL at eight strengths", *scoring.costing(model, ungated, texts(model, n_asked), rounds)),
    ):
        rows.append(Row(f"{name}, {what}", "plain passes / ours", ratio, note=f"Largest difference {error:.1e}."))
    return rows


def generating(
    reference: Any, model: Any, prompt: Any, steering: FineSteer, n_new: int, rounds: int
) -> list[tuple[str, Ratio, int]]:
    """Three ways to generate, the time of each over that of transformers, and how many of its tokens each gives."""
    tokens = torch.tensor([prompt], device=reference.device)
    mask = torch.ones_like(tokens)

    def plain() -> list[int]:
        found = reference.generate(tokens, attention_mask=mask, max_new_tokens=n_new, do_sample=False)
        return found[0, len(prompt) :].tolist()

    def ours(steering: FineSteer | None) -> tuple[int, ...]:
        return generate(model, prompt, steering, max_new_tokens=n_new, progress=False)[0].tokens

    ways: dict[str, Callable[[], Any]] = {
        "its own generate": lambda: decode.own_generate(model, tokens, n_new),
        "fsteer_lens.generate": lambda: ours(None),
        "fsteer_lens.generate, steered": lambda: ours(steering),
    }
    measured = []
    for what, way in ways.items():
        theirs, said = Kept(plain), Kept(way)
        ratio = compare(theirs, said, rounds=rounds, warmup=0)
        assert len(said.value) == len(theirs.value) == n_new, "a model that ends earlier is no measure"
        measured.append((what, ratio, sum(map(eq, said.value, theirs.value))))
    return measured


def fitted(model: Any) -> FineSteer:
    """A steering half way up, of all defaults, that leaves ordinary prompts alone."""
    layer = model.cfg.n_layers // 2
    others = [prompt_ids(model, prompt, chat=True) for prompt in ORDINARY[:GENERAL]]
    general = collect_queries(model, others, layer=layer, progress=False)
    return fit(collect(model, contrasts(model, FITTED), layer=layer, progress=False), general=general)


def worded(texts: Sequence[str], wordings: Sequence[str]) -> list[str]:
    """The texts in each of these wordings; all in one of them before any in the next."""
    return [wording.format(text) for wording in wordings for text in texts]


def asked(count: int, wordings: Sequence[str] = ("{}",)) -> list[tuple[str, str]]:
    """Requests, one of each kind in turn, with the kind."""
    rows = zip(*(worded(texts, wordings) for texts in HARMFUL.values()), strict=True)
    return [pair for row in rows for pair in zip(HARMFUL, row, strict=True)][:count]


def contrasts(model: Any, count: int) -> list[Contrast]:
    """Requests as token ids of a chat, each with its refusal and a consent."""
    return [Contrast(prompt_ids(model, text, chat=True), REFUSALS[kind], CONSENT) for kind, text in asked(count)]


def suite(count: int, wordings: Sequence[str] = ("{}",)) -> TruthfulQA:
    """Requests to which the refusal of their kind is the true answer, and three others are not."""
    choices = []
    for kind, text in asked(count, wordings):
        others = [refusal for other, refusal in REFUSALS.items() if other != kind]
        answers = ((REFUSALS[kind], True), *((refusal, False) for refusal in others[:3]))
        choices.append(Choice(text, answers, answers))
    return TruthfulQA(tuple(choices))


def texts(model: Any, count: int) -> list[Answered]:
    """Ordinary prompts with one answer to all of them."""
    return answered(model, ORDINARY[GENERAL : GENERAL + count], [CONSENT] * count, Passes(chat=True))
