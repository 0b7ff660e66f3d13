"""Reading queries and shifts: `collect` against the plain recipe, and whether its memory grows with the records."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.measuring import (
    Aim,
    Kept,
    OnGpu,
    Ratio,
    Row,
    Section,
    Settings,
    compare,
    gpu_rows,
    peak_memory,
    peak_on_gpu,
)
from fsteer_lens import Contrast, collect, models
from fsteer_lens.prompts.tokens import answer_ids


class Found(NamedTuple):
    """Queries and shifts, [n d] each."""

    queries: Tensor
    shifts: Tensor


def run(settings: Settings) -> Section:
    """Time and values against the plain recipe on every class, and the peak of ten times as many records."""
    shape = "tiny" if settings.quick else "gpt2-small"
    count = 6 if settings.quick else 32
    contrasts = shapes.contrasts(shape, count)
    reference = shapes.hf_model(shape, settings.device)
    rows: list[Row] = []
    n_layers = reference.config.num_hidden_layers
    for kind in models.available_kinds():
        model = shapes.model(shape, kind, settings.device)
        for layer in (n_layers // 3, 2 * n_layers // 3):
            name = f"{models.CLASS_NAMES[kind]}, layer {layer}"
            rows.append(row(name, reference, model, contrasts, layer, settings.rounds_or(3), Aim(8, at_least=True)))
    few = 4 if settings.quick else 16
    peaks = [peak_memory(collecting_in_child, shape, n) for n in (few, 10 * few)]
    grown = Ratio((peaks[1] / peaks[0],), *peaks, unit="MiB")
    rows.append(Row("memory", f"peak for {10 * few} records / for {few}", grown))
    what = "plain recipe / collect, TransformerBridge, bfloat16, a third of the way up"
    rows += gpu_rows("speed", what, Aim(8, at_least=True), settings, on_gpu)
    text = f"""
{count} contrasts of random words, prompts of 60 to 200 tokens and answers of 10 to 40, {shape} shape with random
weights, a third and two thirds of the way up. The plain recipe is three full forward passes of the transformers model
per record (prompt, prompt with either answer), one row each, with the hidden states of all layers; it reads the prompt
alone once more than it must, and computes logits that nobody asks for. `collect` stops at
the layer asked for, runs prompts of about one length at once, and runs a prompt once: both answers go on from
its KV cache. Peaks are measured above the loaded model, each in a process of its own, with two prompts at once, so that
few records fill a batch as well.
""".strip()
    after = (
        '"Multiplications alone" is how many times fewer of them `collect` needs, counted from the weights that each'
        " side runs through and its real tokens. On a CPU, where one row keeps the processor busy already, that is a"
        " ceiling: batches gain nothing there, and padding, which is not counted, costs."
    )
    return Section("Collecting", text, tuple(rows), after)


def row(
    name: str, hf_model: Any, model: Any, contrasts: list[Contrast], layer: int, rounds: int, aim: Aim | None = None
) -> Row:
    """Speed of `collect`, with how far it is from the plain recipe and what it saves by arithmetic."""
    ratio, error = beside_plain(hf_model, model, contrasts, layer, rounds)
    floor = arithmetic(hf_model, model, contrasts, layer)
    note = f"Largest difference {error:.1e} of the largest value; multiplications alone: {floor:.1f}."
    return Row(name, "plain recipe / collect", ratio, aim, note)


def beside_plain(hf_model: Any, model: Any, contrasts: list[Contrast], layer: int, rounds: int) -> tuple[Ratio, float]:
    """How many times as fast as the plain recipe `collect` is, and their largest difference over the largest value."""
    plain = Kept(lambda: plain_recipe(hf_model, model, contrasts, layer))
    ours = Kept(lambda: collect(model, contrasts, layer=layer, progress=False))
    ratio = compare(plain, ours, rounds=rounds, warmup=0).inverse
    pairs = ((ours.value.queries, plain.value.queries), (ours.value.shifts, plain.value.shifts))
    return ratio, max(float((mine - other).abs().max() / other.abs().max()) for mine, other in pairs)


def arithmetic(hf_model: Any, model: Any, contrasts: list[Contrast], layer: int) -> float:
    """Multiplications with weights of the plain recipe over those of `collect`, padding left out."""
    n_layers = hf_model.config.num_hidden_layers
    blocks = {
        name: weight.numel()
        for name, weight in hf_model.named_parameters()
        if weight.ndim == 2 and re.search(r"\.\d+\.", name)
    }
    block = sum(blocks.values()) / n_layers
    head = hf_model.get_output_embeddings().weight.numel()
    prompts = sum(len(contrast.prompt) for contrast in contrasts)
    answers = sum(
        len(answer_ids(model, text)) for contrast in contrasts for text in (contrast.preferred, contrast.undesired)
    )
    return (3 * prompts + answers) * (n_layers * block + head) / ((prompts + answers) * (layer + 1) * block)


def on_gpu(shape: str, count: int = 64, rounds: int = 3) -> OnGpu:
    """Collect on the CUDA device, beside the plain recipe."""
    contrasts, model = shapes.contrasts(shape, count), shapes.model(shape, "bridge", "cuda")
    layer = model.cfg.n_layers // 3
    n_tokens = sum(
        len(contrast.prompt) + len(answer_ids(model, contrast.preferred)) + len(answer_ids(model, contrast.undesired))
        for contrast in contrasts
    )
    peak = peak_on_gpu(lambda: collect(model, contrasts, layer=layer, progress=False))
    ratio, _ = beside_plain(shapes.hf_model(shape, "cuda"), model, contrasts, layer, rounds)
    return OnGpu(ratio, peak, n_tokens / ratio.ours)


@torch.no_grad()
def plain_recipe(hf_model: Any, model: Any, contrasts: list[Contrast], layer: int) -> Found:
    """Three forward passes per record, one row each, all hidden states."""
    queries, shifts = [], []
    for contrast in contrasts:
        prompt = list(contrast.prompt)
        hidden = []
        for answer in ([], answer_ids(model, contrast.preferred), answer_ids(model, contrast.undesired)):
            tokens = torch.tensor([[*prompt, *answer]], device=hf_model.device)  # pyright: ignore[reportGeneralTypeIssues]
            hidden.append(hf_model(tokens, output_hidden_states=True).hidden_states[layer + 1][0].float())
        queries.append(hidden[0][-1])
        shifts.append(hidden[1][len(prompt) :].mean(dim=0) - hidden[2][len(prompt) :].mean(dim=0))
    return Found(torch.stack(queries).cpu(), torch.stack(shifts).cpu())


def collecting_in_child(shape: str, count: int) -> Callable[[], object]:
    """Make a model, and give the call that reads so many contrasts."""
    model = shapes.model(shape, models.available_kinds()[-1])  # the one with weights of its own
    contrasts, layer = shapes.contrasts(shape, count), model.cfg.n_layers // 3
    collect(model, contrasts[:1], layer=layer, progress=False)
    return lambda: collect(model, contrasts, layer=layer, batch_size=2, progress=False)
