"""What steering costs inside transformers, TransformerLens and vLLM, and how fast they are beside each other.

Needs the environment of vLLM: `.venv-vllm/bin/python -m benchmarks.engines`, with `--json` for the rows alone.

1. Each engine generates for the same requests with and without the same steering, in the same pairs.
2. vLLM, steered, is divided by `fsteer_lens.generate`, steered, on a TransformerBridge.
3. vLLM runs the texts that `collect` reads once and adds nothing: what collecting through it would take at least.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fsteer_lens as fs
from benchmarks import elsewhere
from benchmarks.measuring import Kept, Row, Section, Settings, compare
from fsteer_lens import models
from fsteer_lens.demo import chat, requests
from fsteer_lens.models.gguf_files import read_gguf
from fsteer_lens.models.loading import smollm2_file
from fsteer_lens.prompts.tokens import pad, prompt_ids

TITLE = "Engines"
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
REQUESTS = [(kind, text) for kind, texts in requests.HARMFUL.items() for text in texts]
"""What is asked, with its kind."""

Tokens = list[list[int]]


def run(settings: Settings) -> Section:
    """The rows of every engine at every number of requests."""
    torch.set_num_threads(1)
    os.environ |= {**ENGINE, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    counts, n_new, rounds = ((1,), 4, 1) if settings.quick else ((1, 8, 32), 24, settings.rounds_or(3))
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(Path(folder), n_new)
        rows = [row for count in counts for row in steering_rows(engines, count, rounds)]
        rows += [beside_ours(engines, count, rounds) for count in counts[-2:]]
        rows.append(collecting_row(engines, max(counts), rounds))
    text = f"""
SmolLM2-135M-Instruct in float32, one thread, requests of the demonstration as chats, {n_new} greedy tokens to each, of
which none ends an answer. The steering is the demonstration's with `scope="generated"`, decided upon once.
transformers is the model's own `generate` under `steering.on(hf_model)`, TransformerBridge and HookedTransformer are
`fsteer_lens.generate` with its trace, all requests in one batch; vLLM is its V1 runner on the CPU, eager, its requests
sent at once.
""".strip()
    after = """
Collecting stays in TransformerLens: an engine runs every layer and the head for each text, `collect` stops at the layer
that is asked for, and runs a prompt once for its answers.
""".strip()
    return Section(TITLE, text, tuple(rows), after)


class Engines:
    """One model in every engine, with one steering, for generating `n_new` tokens."""

    def __init__(self, folder: Path, n_new: int) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        from fsteer_lens.serving.patches import WORKER

        self.n_new, where = n_new, folder / "model"
        self.network, tokenizer = read_gguf(smollm2_file(), torch.float32)
        self.network.generation_config.eos_token_id = None
        self.network.save_pretrained(where)
        tokenizer.save_pretrained(where)
        self.lenses = {models.CLASS_NAMES[kind]: models.load(where, kind=kind) for kind in models.available_kinds()}
        self.bridge = self.lenses[models.CLASS_NAMES["bridge"]]
        self.steering = chat.fitted(self.bridge)[0].with_scope("generated")
        (folder / "steerings").mkdir()
        fs.save(self.steering, folder / "steerings" / "refusal.safetensors")
        os.environ["FSTEER_STEERINGS"] = str(folder / "steerings")
        options = {"dtype": "float32", "enforce_eager": True, "worker_cls": WORKER, "max_model_len": 256}
        self.llm = LLM(str(where), enable_prefix_caching=False, **options)

    def ways(self) -> dict[str, Callable[[Tokens, bool], Callable[[], Tokens]]]:
        """The engines by name: of prompts, and whether they are steered, each makes a call that generates."""
        lenses = {
            name: lambda ids, steered, model=model: self.in_lens(model, ids, steered)
            for name, model in self.lenses.items()
        }
        return {"transformers": self.in_transformers, **lenses, "vLLM": self.in_vllm}

    def prompts(self, count: int) -> Tokens:
        """The tokens of the first requests."""
        return [prompt_ids(self.bridge, text, chat=True) for _, text in REQUESTS[:count]]

    def in_transformers(self, ids: Tokens, steered: bool) -> Callable[[], Tokens]:
        """Generate with the model's own `generate`."""
        batch = pad(self.bridge, ids, "left")
        how = {"max_new_tokens": self.n_new, "min_new_tokens": self.n_new, "do_sample": False, "pad_token_id": 0}

        def generated() -> Tokens:
            made = self.network.generate(batch.tokens, attention_mask=batch.mask.long(), **how)
            return made[:, batch.tokens.shape[1] :].tolist()

        def under() -> Tokens:
            with self.steering.on(self.network):
                return generated()

        return under if steered else generated

    def in_lens(self, model: Any, ids: Tokens, steered: bool) -> Callable[[], Tokens]:
        """Generate with `fsteer_lens.generate`."""
        on = self.steering if steered else None
        how: dict[str, Any] = {"max_new_tokens": self.n_new, "batch_size": len(ids), "progress": False}
        return lambda: [list(one.tokens) for one in fs.generate(model, ids, on, **how)]

    def in_vllm(self, ids: Sequence[Sequence[int]], steered: bool, n_new: int | None = None) -> Callable[[], Tokens]:
        """Generate in vLLM."""
        from vllm import SamplingParams

        from fsteer_lens.serving import arguments

        extra = arguments("refusal") if steered else None
        params = SamplingParams(temperature=0, max_tokens=n_new or self.n_new, ignore_eos=True, extra_args=extra)
        asked = [{"prompt_token_ids": list(row)} for row in ids]
        return lambda: [list(one.outputs[0].token_ids) for one in self.llm.generate(asked, params, use_tqdm=False)]


def steering_rows(engines: Engines, count: int, rounds: int) -> Iterator[Row]:
    """What steering costs in each engine at one number of requests."""
    ids = engines.prompts(count)
    for name, way in engines.ways().items():
        steered = Kept(way(ids, True))
        ratio = compare(way(ids, False), steered, rounds=rounds)
        assert max(map(len, steered.value)) == engines.n_new, "a model that ends earlier is no measure"
        note = f"{count * engines.n_new / ratio.ours:.0f} tokens/s steered."
        yield Row(f"{name}, {count} request{'s' * (count > 1)}", "steered / unsteered", ratio, note=note)


def beside_ours(engines: Engines, count: int, rounds: int) -> Row:
    """How many times as fast as `generate` vLLM steers, and how many answers are the same."""
    ids = engines.prompts(count)
    theirs, ours = Kept(engines.in_lens(engines.bridge, ids, True)), Kept(engines.in_vllm(ids, True))
    ratio = compare(theirs, ours, rounds=rounds).inverse
    same = sum(one[: len(two)] == two for one, two in zip(ours.value, theirs.value, strict=True))
    note = f"{same} of {count} answers are the same."
    return Row(f"vLLM, steered, {count} requests", "fsteer_lens.generate / vLLM", ratio, note=note)


def collecting_row(engines: Engines, count: int, rounds: int) -> Row:
    """A pass of vLLM over the texts of contrasts beside `collect`."""
    model, ids = engines.bridge, engines.prompts(count)
    kinds = [kind for kind, _ in REQUESTS[:count]]
    contrasts = [
        fs.Contrast(row, requests.REFUSALS[kind], requests.CONSENT) for row, kind in zip(ids, kinds, strict=True)
    ]
    texts = [
        [*contrast.prompt, *model.tokenizer.encode(answer)]
        for contrast in contrasts
        for answer in (contrast.preferred, contrast.undesired)
    ]
    layer = model.cfg.n_layers // 3
    ratio = compare(
        lambda: fs.collect(model, contrasts, layer=layer, progress=False),
        engines.in_vllm(texts, False, n_new=1),
        rounds=rounds,
    )
    note = "At least: only the texts are run, nothing is read."
    return Row(f"vLLM, {len(texts)} texts", f"the engine's pass over them / collect at layer {layer}", ratio, note=note)


if __name__ == "__main__":
    elsewhere.main(run, __doc__)
