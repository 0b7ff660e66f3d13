"""What steering costs inside transformers, TransformerLens and vLLM, and how fast they are beside each other.

Needs the environment of vLLM: `.venv-vllm/bin/python -m benchmarks.engines`, with `--json` for the rows alone.

1. Each engine generates for the same requests with and without the same steering, in the same pairs.
2. vLLM, steered, is divided by `fsteer_lens.generate`, steered, on a TransformerBridge.
3. vLLM runs the texts that `collect` reads once and adds nothing: what collecting through it would take at least.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import elsewhere
from benchmarks.measuring import Kept, Row, Section, Settings, compare

TITLE = "Engines"
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def run(settings: Settings) -> Section:
    """The rows of every engine at every number of requests."""
    torch.set_num_threads(1)
    os.environ |= {**ENGINE, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    counts, n_new, rounds = ((1,), 4, 1) if settings.quick else ((1, 8, 32), 24, settings.rounds_or(3))
    with tempfile.TemporaryDirectory() as name:
        rows = _rows(Path(name), counts, n_new, rounds)
    text = f"""
SmolLM2-135M-Instruct in float32, one thread, requests of the demonstration as chats, {n_new} greedy tokens to each, of
which none ends an answer. The steering is the demonstration's with `scope="generated"`, decided upon once.
transformers is the model's own `generate` under `steering.on(hf_model)`, TransformerBridge is `fsteer_lens.generate`
with its trace, all requests in one batch; vLLM is its V1 runner on the CPU, eager, its requests sent at once.
""".strip()
    after = """
Collecting stays in TransformerLens: an engine runs every layer and the head for each text, `collect` stops at the layer
that is asked for, and runs a prompt once for its answers.
""".strip()
    return Section(TITLE, text, tuple(rows), after)


def _rows(folder: Path, counts: tuple[int, ...], n_new: int, rounds: int) -> list[Row]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    import fsteer_lens as fs
    from fsteer_lens import models
    from fsteer_lens.demo import chat, requests
    from fsteer_lens.models.gguf_files import read_gguf
    from fsteer_lens.models.loading import smollm2_file
    from fsteer_lens.prompts.tokens import pad, prompt_ids
    from fsteer_lens.serving import arguments
    from fsteer_lens.serving.patches import WORKER

    network, tokenizer = read_gguf(smollm2_file(), torch.float32)
    network.generation_config.eos_token_id = None
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    bridge = models.load(folder / "model", kind="bridge")
    steering = chat.fitted(bridge)[0].with_scope("generated")
    (folder / "steerings").mkdir()
    fs.save(steering, folder / "steerings" / "refusal.safetensors")
    os.environ["FSTEER_STEERINGS"] = str(folder / "steerings")
    engine = LLM(
        str(folder / "model"),
        dtype="float32",
        enforce_eager=True,
        worker_cls=WORKER,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    kinds = [(kind, text) for kind, texts in requests.HARMFUL.items() for text in texts][: max(counts)]
    asked = [prompt_ids(bridge, text, chat=True) for _, text in kinds]

    def in_vllm(ids: list[list[int]], steered: bool, new: int = n_new) -> Callable[[], Any]:
        extra = arguments("refusal") if steered else None
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, extra_args=extra)
        prompts = [{"prompt_token_ids": row} for row in ids]
        return lambda: [list(one.outputs[0].token_ids) for one in engine.generate(prompts, params, use_tqdm=False)]

    def in_transformers(ids: list[list[int]], steered: bool) -> Callable[[], Any]:
        batch = pad(bridge, ids, "left")
        how = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}

        def generated() -> Any:
            made = network.generate(batch.tokens, attention_mask=batch.mask.long(), **how)
            return made[:, batch.tokens.shape[1] :].tolist()

        def under() -> Any:
            with steering.on(network):
                return generated()

        return under if steered else generated

    def in_bridge(ids: list[list[int]], steered: bool) -> Callable[[], Any]:
        on = steering if steered else None
        how: dict[str, Any] = {"max_new_tokens": n_new, "batch_size": len(ids), "progress": False}
        return lambda: [list(one.tokens) for one in fs.generate(bridge, ids, on, **how)]

    rows = []
    ways = {"transformers": in_transformers, "TransformerBridge": in_bridge, "vLLM": in_vllm}
    for count in counts:
        ids = asked[:count]
        for name, way in ways.items():
            steered = Kept(way(ids, True))
            ratio = compare(way(ids, False), steered, rounds=rounds)
            assert max(map(len, steered.value)) == n_new, "a model that ends earlier is no measure"
            speed = count * n_new / ratio.ours
            note = f"{speed:.0f} tokens/s steered."
            rows.append(Row(f"{name}, {count} request{'s' * (count > 1)}", "steered / unsteered", ratio, note=note))
    for count in counts[-2:]:
        theirs, ours = Kept(in_bridge(asked[:count], True)), Kept(in_vllm(asked[:count], True))
        ratio = compare(theirs, ours, rounds=rounds).inverse
        same = sum(one[: len(two)] == two for one, two in zip(ours.value, theirs.value, strict=True))
        note = f"{same} of {count} answers are the same."
        rows.append(Row(f"vLLM, steered, {count} requests", "fsteer_lens.generate / vLLM", ratio, note=note))
    answers = [(row, requests.REFUSALS[kind]) for row, (kind, _) in zip(asked, kinds, strict=True)]
    contrasts = [fs.Contrast(row, refusal, requests.CONSENT) for row, refusal in answers]
    texts = [
        [*row, *bridge.tokenizer.encode(answer)] for row, refusal in answers for answer in (refusal, requests.CONSENT)
    ]
    layer = bridge.cfg.n_layers // 3
    collected = compare(
        lambda: fs.collect(bridge, contrasts, layer=layer, progress=False), in_vllm(texts, False, 1), rounds=rounds
    )
    note = "At least: only the texts are run, nothing is read."
    rows.append(
        Row(
            f"vLLM, {len(texts)} texts", f"the engine's pass over them / collect at layer {layer}", collected, note=note
        )
    )
    return rows


if __name__ == "__main__":
    elsewhere.main(run, __doc__)
