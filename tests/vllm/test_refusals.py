"""What an engine or a request is refused for, without an engine or by one that does not start."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fsteer_lens.errors import HookError
from fsteer_lens.serving import patches
from fsteer_lens.serving.artefacts import catalogue
from fsteer_lens.serving.engines import require_engine, require_runner
from tests.vllm.engines import WORKER, Served, engine

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)


def configured(**changes: Any) -> Any:
    """An engine's settings as far as they are looked at."""
    made = SimpleNamespace(
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name="NONE"), cudagraph_mode=SimpleNamespace(name="NONE")
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, worker_cls=WORKER),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        *way, name = path.split("__")
        place = made
        for part in way:
            place = getattr(place, part)
        setattr(place, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"compilation_config__mode": SimpleNamespace(name="VLLM_COMPILE")}, "--enforce-eager"),
        ({"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL")}, "CUDA graphs FULL"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"parallel_config__pipeline_parallel_size": 2}, "may lack the layer"),
        ({"parallel_config__tensor_parallel_size": 2}, "decide apart"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_dbo": True}, "DBO"),
        ({"compilation_config__pass_config": SimpleNamespace(enable_sp=True)}, "sequence parallelism"),
        ({"kv_transfer_config": object()}, "would leave the engine"),
    ],
)
def test_an_engine_that_would_skip_hooks_is_refused(changes: dict[str, Any], told: str) -> None:
    require_engine(configured())
    with pytest.raises(HookError, match=told):
        require_engine(configured(**changes))


def test_the_other_model_runner_is_refused() -> None:
    require_runner(SimpleNamespace(input_batch=None))
    with pytest.raises(HookError, match="VLLM_USE_V2_MODEL_RUNNER"):
        require_runner(SimpleNamespace())


def asked(**changes: Any) -> Any:
    """A request of the engine as far as it is looked at."""
    made = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={"fsteer": "late"}),
        pooling_params=None,
        prompt_embeds=None,
        mm_features=None,
        resumable=False,
        lora_request=None,
    )
    vars(made).update(changes)
    return made


@pytest.mark.parametrize(
    ("request_", "config", "told"),
    [
        ({}, {"parallel_config__worker_cls": "auto"}, "without --worker-cls"),
        ({"prompt_embeds": object()}, {}, "embeddings, pictures"),
        ({"mm_features": [1]}, {}, "embeddings, pictures"),
        ({"resumable": True}, {}, "still coming"),
        ({"lora_request": object()}, {}, "LoRA"),
        (
            {"sampling_params": None, "pooling_params": SimpleNamespace(extra_args={"fsteer": "late"})},
            {},
            "a request for embeddings",
        ),
        ({"sampling_params": SimpleNamespace(extra_args={"fsteer": "all"})}, {}, "--no-enable-chunked-prefill"),
    ],
)
def test_a_request_that_cannot_be_steered_is_refused(
    served: Served, request_: dict[str, Any], config: dict[str, Any], told: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    catalogue.cache_clear()
    assert patches.checked(asked(), configured()) is not None
    assert patches.checked(asked(sampling_params=SimpleNamespace(extra_args=None)), configured()) is None
    with pytest.raises(VLLMValidationError, match=told):
        patches.checked(asked(**request_), configured(**config))


def test_another_version_of_vllm_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(HookError, match=r"0\.32"):
        patches.register()


def test_beam_search_is_refused(served: Served) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    patches.register()
    body = {"model": "m", "prompt": "a", "use_beam_search": True, "n": 2}
    CompletionRequest(**body).to_beam_search_params(4, {})
    with pytest.raises(VLLMValidationError, match="beam search"):
        CompletionRequest(**body, vllm_xargs={"fsteer": "late"}).to_beam_search_params(4, {})


@pytest.mark.parametrize("records", [{}, {"a": {"fsteer": "late", "error": "the numbers blew up"}}])
def test_a_request_that_nobody_decided_upon_ends_in_an_error(records: dict[str, Any]) -> None:
    """Of two requests of a step the steered one, without a record or with a failure, loses its tokens."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    ended = []
    params = {"a": SimpleNamespace(extra_args={"fsteer": "late"}), "b": SimpleNamespace(extra_args=None)}
    scheduler = SimpleNamespace(
        requests={number: SimpleNamespace(sampling_params=one) for number, one in params.items()},
        finish_requests=lambda number, status: ended.append((number, status.name)),
    )
    outputs = [EngineCoreOutput(request_id=number, new_token_ids=[5]) for number in params]
    plan = SimpleNamespace(num_scheduled_tokens={"a": 1, "b": 1})
    update = patches.with_records(lambda *_: {0: SimpleNamespace(outputs=outputs)})
    update(scheduler, plan, SimpleNamespace(fsteer=records))
    steered, other = outputs
    assert steered.new_token_ids == [] and steered.finish_reason is FinishReason.ERROR
    assert other.new_token_ids == [5] and other.finish_reason is None and other.kv_transfer_params is None
    assert ended == [("a", "FINISHED_ERROR")]


def test_an_engine_that_compiles_does_not_start(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    from vllm import LLM

    with pytest.raises(RuntimeError, match="initialization failed"):
        LLM(str(served.folder), dtype="float32", worker_cls=WORKER, max_model_len=256)
    assert "this engine cannot be steered" in "".join(capfd.readouterr())


def test_an_engine_with_other_weights_does_not_start(
    served: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of the weights before the steered layer is 1 % larger."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(served.folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    weights[name] = 1.01 * weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(weights[name], load_file(served.folder / "model.safetensors")[name])
    with pytest.raises(RuntimeError, match="initialization failed"):
        engine(Served(served.model, folder, served.steerings))
    assert "this was fitted on another model" in "".join(capfd.readouterr())
