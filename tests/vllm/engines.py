"""Engines under test, what they serve, and what `generate` says to the same prompts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import fsteer_lens as fs
from fsteer_lens import Schedule, SubspaceAblation, Window, chain, generate, models
from fsteer_lens.demo import chat, requests
from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.serving import arguments, record_of
from fsteer_lens.steering import MeanShift

NEW = 10
WORKER = "fsteer_lens.serving.Worker"
SEVERAL_LAYERS = {"chain"}
SYSTEM = (
    "You are a patient assistant in a library. You answer in short and plain sentences, you say so when you do not"
    " know something, and you never make up the name of a book, of an author or of a place. When a visitor asks for"
    " something that is not on the shelves, you tell where else it may be found."
)
"""Long enough for blocks of 32 tokens that several prompts share."""
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Served:
    """A model in a folder, steerings in another, and the same on this side."""

    model: SteerableModel
    folder: Path
    steerings: dict[str, HookObject]
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def artefacts(self) -> Path:
        return self.folder.parent / "steerings"

    def expected(self, ids: Sequence[int], name: str | None, new: int = NEW) -> Any:
        """What `generate` makes of a prompt; worked out once."""
        asked = (tuple(ids), name, new)
        if asked not in self.known:
            steering, read = self.steerings.get(name or ""), "live" if name in SEVERAL_LAYERS else None
            made = generate(self.model, [list(ids)], steering, read=read, max_new_tokens=new, progress=False)
            self.known[asked] = made[0]
        return self.known[asked]


def serve(folder: Path) -> Served:
    """SmolLM2 as a folder of transformers, and steerings that were fitted to it."""
    from fsteer_lens.models.gguf_files import read_gguf
    from fsteer_lens.models.loading import smollm2_file

    network, tokenizer = read_gguf(smollm2_file(), torch.float32)
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = models.load(folder / "model", kind="bridge")
    steerings = _steerings(model)
    (folder / "steerings").mkdir()
    for name, steering in steerings.items():
        fs.save(steering, folder / "steerings" / f"{name}.safetensors", model)
    os.environ["FSTEER_STEERINGS"] = str(folder / "steerings")
    return Served(model, folder / "model", steerings)


def _steerings(model: SteerableModel) -> dict[str, HookObject]:
    """A steering whose gate reads the mean of a prompt, one whose gate reads its last token, and forms of them."""
    mean, own = chat.fitted(model)
    last = fs.fit(own.reading("last"), strength=mean.strength)
    assert mean.reads == ("last", "mean") and last.reads == ("last",)
    (layer,) = mean.layers
    late, gate = mean.with_scope("generated"), last.gate_at(layer)
    shift = MeanShift(own.shifts.mean(dim=0), layer=layer + 4, scope="generated")
    return {
        "late": late,
        "last": last.with_scope("generated"),
        "window": late.with_scope(Window(1, 4)),
        "schedule": late.with_schedule(Schedule((1.0, 0.5, 0.25))),
        "monitor": mean.with_monitor(),
        "step": replace(last, scope="generated", refresh="step"),
        "ablation": SubspaceAblation(gate.subspace, layer=layer),  # type: ignore[union-attr]
        "chain": chain(late, shift),
        "all": mean.with_scope("all"),
        "prompt": mean.with_scope("prompt"),
    }


def prompts(model: SteerableModel, system: str | None = None) -> list[list[int]]:
    """Requests that a steering is for and others, as tokens of chats."""
    texts = [asked[-1] for asked in requests.HARMFUL.values()][:3] + list(requests.ORDINARY[:2]) + [requests.SUMS[0]]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [prompt_ids(model, [*before, {"role": "user", "content": text}]) for text in texts]


def engine(served: Served, **options: Any) -> Any:
    """An engine of vLLM on the CPU with the plugin."""
    from vllm import LLM

    return LLM(
        str(served.folder),
        dtype="float32",
        enforce_eager=True,
        worker_cls=WORKER,
        max_model_len=256,
        block_size=32,
        disable_log_stats=False,
        **options,
    )


def sampling(name: str | None, new: int = NEW, **more: Any) -> Any:
    """Greedy sampling under a steering, or under none."""
    from vllm import SamplingParams

    read = "live" if name in SEVERAL_LAYERS else None
    extra = None if name is None else arguments(name, read=read, **more)  # type: ignore[arg-type]
    return SamplingParams(temperature=0, max_tokens=new, extra_args=extra)


def answers(llm: Any, ids: Sequence[Sequence[int]], names: Sequence[str | None], new: int = NEW) -> list[Any]:
    """The engine's answers to prompts that arrive together, each under its own steering."""
    asked = [{"prompt_token_ids": list(row)} for row in ids]
    return llm.generate(asked, [sampling(name, new) for name in names], use_tqdm=False)


def counted(llm: Any, name: str) -> float:
    """A counter of the engine."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def compare(served: Served, answer: Any, ids: Sequence[int], name: str | None, new: int = NEW) -> None:
    """See that an answer has the tokens of `generate`, and its record the decisions."""
    expected = served.expected(ids, name, new)
    for one in answer.outputs:
        assert tuple(one.token_ids) == expected.tokens, (name, one.text, expected.text)
    if name is None:
        return
    record = record_of(answer)
    assert record.steering == name
    pairs = [(record.trace, expected.trace), *zip(record.trace.parts, expected.trace.parts, strict=True)]
    for found, told in pairs:
        assert set(found.gate) == set(told.gate)
        for layer in found.gate:
            torch.testing.assert_close(found.gate[layer], told.gate[layer], atol=1e-4, rtol=0)
        for layer in found.weights:
            torch.testing.assert_close(found.weights[layer], told.weights[layer], atol=1e-4, rtol=0)
    for layer, change in expected.trace.change.items():
        assert record.edited.get(layer, 0) == int((change > 0).sum()), (name, record.edited)
