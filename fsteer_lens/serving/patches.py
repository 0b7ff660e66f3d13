"""The changes to vLLM: what a request may ask for, which blocks it may share, and what its answer brings.

vLLM has no interface for these. They are refused on a version that they were not tried with, and not made where no
folder of steerings is given.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from fsteer_lens.errors import FsteerError, HookError
from fsteer_lens.serving.artefacts import FOLDER, NAME, Artefact, catalogue, require_artefact

TRIED: Final = "0.32"
"""vLLM's version, without its last part, that this was read and run with."""
WORKER: Final = "fsteer_lens.serving.Worker"
MARK: Final = "_changed_by_fsteer_lens"
Function = Callable[..., Any]


def register() -> None:
    """Change vLLM in this process; once, and only where FSTEER_STEERINGS names a folder.

    Raises:
        HookError: another version of vLLM, or one whose blocks are hashed in another way.
    """
    if not os.environ.get(FOLDER):
        return
    import vllm  # pyright: ignore[reportMissingImports]
    import vllm.v1.core.kv_cache_utils as kv  # pyright: ignore[reportMissingImports]
    from vllm.entrypoints.openai.chat_completion import protocol as chats  # pyright: ignore[reportMissingImports]
    from vllm.entrypoints.openai.completion import protocol as texts  # pyright: ignore[reportMissingImports]
    from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]

    if not vllm.__version__.startswith(f"{TRIED}."):
        raise HookError("vLLM", expected=f"{TRIED}, which this was tried with", got=vllm.__version__)
    hasher = kv.get_request_block_hasher
    if hasher.__globals__ is not vars(kv) or "generate_block_hash_extra_keys(" not in inspect.getsource(hasher):
        raise HookError("vLLM's prefix cache", expected="blocks that are hashed with extra keys", got="others")
    _change(InputProcessor, "process_inputs", _with_checks)
    _change(kv, "generate_block_hash_extra_keys", _with_keys)
    _change(Scheduler, "update_from_output", with_records)
    for protocol in (chats.ChatCompletionRequest, texts.CompletionRequest):
        _change(protocol, "to_beam_search_params", _without_beams)


def _change(owner: Any, name: str, made: Callable[[Function], Function]) -> None:
    """Put a function made from the present one in its place, unless that is done already."""
    present = getattr(owner, name)
    if not hasattr(present, MARK):
        changed = functools.wraps(present)(made(present))
        setattr(changed, MARK, True)
        setattr(owner, name, changed)


def _with_checks(process_inputs: Function) -> Function:
    """Refuse, before it enters the engine, what cannot be steered; in the front end, so that HTTP answers 400."""

    def processed(self: Any, *args: Any, **options: Any) -> Any:
        request = process_inputs(self, *args, **options)
        artefact = checked(request, self.vllm_config)
        if artefact is not None and artefact.needs_prompts_whole:
            request.sampling_params.skip_reading_prefix_cache = True
        return request

    return processed


def checked(request: Any, config: Any) -> Artefact | None:
    """The steering that a request of the engine names, None for none; raises vLLM's error where it cannot be had."""
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    arguments = _arguments(request.sampling_params or request.pooling_params)
    if not any(name.startswith(NAME) for name in arguments):
        return None
    try:
        artefact = require_artefact(arguments, catalogue())
    except FsteerError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    assert artefact is not None
    problems = {
        f"an engine without --worker-cls {WORKER}": config.parallel_config.worker_cls != WORKER,
        "a request for embeddings": request.sampling_params is None,
        "a prompt of embeddings, pictures or sound": bool(request.prompt_embeds is not None or request.mm_features),
        "a prompt that is still coming": bool(request.resumable),
        "a LoRA, which it was not fitted with": request.lora_request is not None,
        f"{artefact.name}, which edits prompts, where prompts may come in pieces: start vLLM with"
        " --no-enable-chunked-prefill, or save the steering with scope='generated'": artefact.needs_prompts_at_once
        and config.scheduler_config.enable_chunked_prefill,
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise VLLMValidationError(f"cannot steer {'; '.join(found)}", parameter="vllm_xargs")
    return artefact


def _with_keys(extra_keys: Function) -> Function:
    """Let blocks that a steering has touched be found by requests alone that would compute the same."""

    def keyed(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, index = extra_keys(request, start_token_idx, end_token_idx, start_mm_idx)
        arguments = _arguments(request.sampling_params)
        if NAME not in arguments:
            return keys, index
        artefact = catalogue()[arguments[NAME]]
        if not artefact.edits or not (artefact.edits_prompts or end_token_idx >= request.num_prompt_tokens):
            return keys, index
        own = (NAME, artefact.cache_key(request.prompt_token_ids, arguments))
        return (*(keys or ()), own), index

    return keyed


def with_records(update: Function) -> Function:
    """Send the record along with every output of a steered request; end those that have none, or failed."""

    def told(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        numbers = [number for number in scheduler_output.num_scheduled_tokens if number in self.requests]
        asked = {number: _arguments(self.requests[number].sampling_params).get(NAME) for number in numbers}
        records = getattr(model_runner_output, NAME, {})
        outputs = update(self, scheduler_output, model_runner_output)
        for batch in outputs.values():
            for output in batch.outputs:
                if asked.get(output.request_id) is None:
                    continue
                none = {NAME: asked[output.request_id], "error": "nobody decided upon this request"}
                record = records.get(output.request_id, none)
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), NAME: record}
                if "error" in record:
                    _end(self, output)
        return outputs

    return told


def _end(scheduler: Any, output: Any) -> None:
    """End a request in an error, without the text of this step."""
    from vllm.v1.engine import FinishReason  # pyright: ignore[reportMissingImports]
    from vllm.v1.request import RequestStatus  # pyright: ignore[reportMissingImports]

    if output.finish_reason is None:
        scheduler.finish_requests(output.request_id, RequestStatus.FINISHED_ERROR)
    output.finish_reason, output.stop_reason, output.new_token_ids = FinishReason.ERROR, None, []


def _without_beams(to_params: Function) -> Function:
    """Refuse beam search, whose own requests carry no arguments and would run without steering."""

    def refused(self: Any, *args: Any, **options: Any) -> Any:
        from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

        if any(name.startswith(NAME) for name in self.vllm_xargs or {}):
            raise VLLMValidationError("cannot steer beam search", parameter="vllm_xargs")
        return to_params(self, *args, **options)

    return refused


def _arguments(params: Any) -> Mapping[str, Any]:
    return getattr(params, "extra_args", None) or {}
