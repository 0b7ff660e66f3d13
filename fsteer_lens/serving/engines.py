"""What an engine must be like for its hooks to run, and whether its model is the one that was fitted on."""

from typing import Any

import torch

from fsteer_lens.errors import HookError
from fsteer_lens.models.points import Point
from fsteer_lens.reading.fingerprints import Fingerprint, probe_ids, probed, tokens_of
from fsteer_lens.serving.layers import Layers

PROBE = "fsteer-probe"


def require_engine(config: Any) -> None:
    """Raise `HookError` where an engine of this configuration would run past the hooks, or let what they do leak."""
    compiled, parallel = config.compilation_config, config.parallel_config
    modes = {"compilation": compiled.mode, "CUDA graphs": compiled.cudagraph_mode}
    on = {name: getattr(mode, "name", str(mode)) for name, mode in modes.items()}
    problems = {
        f"{name} {mode}, which skips hooks: add --enforce-eager": mode != "NONE" for name, mode in on.items()
    } | {
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism: a rank may lack the layer": parallel.pipeline_parallel_size > 1,
        "tensor parallelism: its ranks would decide apart": parallel.tensor_parallel_size > 1,
        "context parallelism": max(_sizes(parallel, "decode_context", "prefill_context")) > 1,
        "two batches at once (DBO)": any(getattr(parallel, name, False) for name in ("enable_dbo", "use_ubatching")),
        "sequence parallelism": getattr(getattr(compiled, "pass_config", None), "enable_sp", False),
        "a KV connector: what was computed under a steering would leave the engine": bool(config.kv_transfer_config),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise HookError("this engine cannot be steered", expected="one without any of these", got="; ".join(found))


def _sizes(parallel: Any, *names: str) -> list[int]:
    return [getattr(parallel, f"{name}_parallel_size", 1) for name in names]


def require_runner(runner: Any) -> None:
    """Raise `HookError` unless this is the model runner whose batches the hooks can read."""
    if not hasattr(runner, "input_batch"):
        fix = "Set VLLM_USE_V2_MODEL_RUNNER=0."
        raise HookError("the model runner", expected="vLLM's V1 runner", got=type(runner).__name__, fix=fix)


def require_fingerprints(worker: Any, layers: Layers, tokenizer: Any) -> None:
    """Run each fingerprint's tokens through the engine's own model.

    Raises:
        MismatchError: a steering was fitted on another model, other weights or another tokenizer; names the difference.
        HookError: a hook did not run.
    """
    links = [link for artefact in layers.artefacts.values() for link in artefact.steering.links]
    for known in {link.fingerprint for link in links if link.fingerprint is not None}:
        known.require_match(_fingerprint(worker, layers, known, tokenizer))


def _fingerprint(worker: Any, layers: Layers, known: Fingerprint, tokenizer: Any) -> Fingerprint:
    """The engine's own, at the layers of another one."""
    config = worker.vllm_config.model_config
    text = config.hf_text_config
    layers.probed = {}
    try:
        _run(worker, probe_ids(text.vocab_size))
        points = [Point(layer, known.site) for layer in known.probe]
        missing = [point.name for point in points if point in layers.points and point not in layers.probed]
        if missing:
            raise HookError("the engine ran past hooks", got=missing, fix="Start vLLM with --enforce-eager.")
        rows = {point.layer: row for point, row in layers.probed.items() if point in points}
    finally:
        layers.probed = None
    return Fingerprint(
        architecture=config.hf_config.architectures[0],
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        d_vocab=text.vocab_size,
        site=known.site,
        **tokens_of(tokenizer, text.vocab_size),
        probe={layer: probed(row[len(probe_ids(1)) - 1]) for layer, row in rows.items()},
        model_class="vLLM",
        processed=False,
        dtype=str(config.dtype),
    )


@torch.inference_mode()
def _run(worker: Any, ids: list[int]) -> None:
    """Run tokens through the model as one request of their own, and forget it."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput  # pyright: ignore[reportMissingImports]

    runner = worker.model_runner
    request = NewRequestData(
        req_id=PROBE,
        prompt_token_ids=ids,
        mm_features=[],
        sampling_params=SamplingParams(temperature=0, max_tokens=1),
        pooling_params=None,
        block_ids=tuple([1] for _ in runner.kv_cache_config.kv_cache_groups),
        num_computed_tokens=0,
        lora_request=None,
    )
    plan = SchedulerOutput.make_empty()
    plan.scheduled_new_reqs = [request]
    plan.num_scheduled_tokens = {PROBE: len(ids)}
    plan.total_num_scheduled_tokens = len(ids)
    if runner.execute_model(plan) is None:
        runner.sample_tokens(None)
    end = SchedulerOutput.make_empty()
    end.finished_req_ids = {PROBE}
    runner.execute_model(end)
