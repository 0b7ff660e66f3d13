"""Hooks on the decoder layers of an engine, whose batch is one flat [tokens, d], one request after another."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import HookError, SiteError
from fsteer_lens.models.points import Point
from fsteer_lens.serving.artefacts import Artefact, require_artefact
from fsteer_lens.serving.requests import Request

KEPT: Final = 1024
"""Requests whose traces can be asked for after they have ended."""


class Layers:
    """The steered requests of one worker, and the hooks through which they are read and edited.

    Attributes:
        artefacts: the steerings that requests may name.
        points: where there are hooks, as a forward pass reaches them.
        records: what is known of the steered requests of the latest step whose prompts are through, by their numbers.
        probed: where the stream of every token is copied to in place of all else, {point: [tokens d]}; or None.
    """

    def __init__(self, worker: Any, artefacts: Mapping[str, Artefact]) -> None:
        self._worker, self.artefacts = worker, artefacts
        self._d_model = worker.vllm_config.model_config.hf_text_config.hidden_size
        self._requests: dict[str, Request] = {}
        self._ended: OrderedDict[str, Request] = OrderedDict()
        self._plan: Any = None
        self._done: dict[str, int] = {}
        self._fired: list[Point] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.probed: dict[Point, Tensor] | None = None
        steerings = [artefact.steering for artefact in artefacts.values()]
        self.points = sorted({point for steering in steerings for point in steering.points}, key=_order)
        modules = _decoder_layers(worker)
        for point in self.points:  # what enters a layer is what leaves the one below
            place = point.layer - (point.site == "hook_resid_pre")
            if place >= len(modules):
                raise SiteError("layer", expected=f"one of 0 to {len(modules) - 1}", got=point.layer)
            modules[place].register_forward_hook(lambda module, args, output, point=point: self._at(point, output))

    def begin(self, plan: Any) -> None:
        """Take in what the scheduler has planned for a step."""
        for number in plan.finished_req_ids:
            request = self._requests.pop(number, None)
            if request is not None:
                self._ended[request.key] = request
        while len(self._ended) > KEPT:
            self._ended.popitem(last=False)
        self._done = {}
        for new in plan.scheduled_new_reqs:
            self._done[new.req_id] = new.num_computed_tokens
            arguments = (new.sampling_params and new.sampling_params.extra_args) or {}
            artefact = require_artefact(arguments, self.artefacts)
            if artefact is not None and new.req_id not in self._requests:
                self._requests[new.req_id] = Request(new.req_id, artefact, arguments, len(new.prompt_token_ids))
        cached = plan.scheduled_cached_reqs
        self._done.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._plan, self._fired, self.records = plan, [], {}

    def _steered(self) -> list[tuple[str, slice, int]]:
        """Numbers of the steered requests of this step, where their tokens lie in the batch, how many came before."""
        found, start = [], 0
        for number in self._worker.model_runner.input_batch.req_ids:
            stop = start + self._plan.num_scheduled_tokens[number]
            if number in self._requests:
                found.append((number, slice(start, stop), self._done[number]))
            start = stop
        return found

    def _at(self, point: Point, output: Any) -> None:
        """React to what leaves a decoder layer, by writing into it."""
        hidden, residual = self._parts(point, output)
        if self.probed is not None:
            self.probed[point] = _stream(hidden, residual).clone()
            return
        if self._plan is None or not self._requests:
            return
        self._fired.append(point)
        for number, rows, done in self._steered():
            request = self._requests[number]
            if point not in request.points:
                continue
            edit = request.edit(point, _stream(hidden[rows], None if residual is None else residual[rows]), done)
            if edit is not None:
                hidden[rows] = (hidden[rows].float() + edit).to(hidden.dtype)

    def _parts(self, point: Point, output: Any) -> tuple[Tensor, Tensor | None]:
        """The one or two [tokens, d] whose sum is the residual stream after a layer."""
        n_tokens = 0 if self._plan is None else self._plan.total_num_scheduled_tokens
        parts = output if isinstance(output, tuple) else (output,)
        # a batch of one is taken apart: what is written to the view reaches the model
        flat = [part[0] if isinstance(part, Tensor) and part.ndim == 3 and len(part) == 1 else part for part in parts]
        fits = [isinstance(one, Tensor) and one.ndim == 2 and one.shape[1] == self._d_model for one in flat]
        if not all(fits) or len(flat) not in (1, 2) or any(len(one) < n_tokens for one in flat):
            expected = f"one tensor or two, [{n_tokens} or more, {self._d_model}]"
            got = [getattr(one, "shape", type(one).__name__) for one in flat]
            raise HookError(f"what leaves the engine's layer at {point.name}", expected=expected, got=got)
        return flat[0], flat[1] if len(flat) == 2 else None

    def end(self) -> None:
        """See that every hook of the steered requests ran once in this step, and that all are decided upon.

        Raises:
            HookError: one was skipped: nobody knows what the engine has computed.
        """
        for number, rows, done in self._steered():
            request = self._requests[number]
            counts = {point.name: self._fired.count(point) for point in request.points}
            if any(count != 1 for count in counts.values()):
                fix = "Start vLLM with --enforce-eager."
                raise HookError("the engine ran past hooks", expected="each once in a step", got=counts, fix=fix)
            if done + rows.stop - rows.start >= request.prompt_length:
                request.require_decided()
                self.records[number] = request.record()
        self._plan = None

    def trace_of(self, key: str) -> list[dict[str, Any]] | None:
        """The trace of a request by its key, as `Trace.to_records` gives it; None where it is not kept."""
        running = {request.key: request for request in self._requests.values()}
        request = running.get(key, self._ended.get(key))
        return None if request is None or request.error is not None else request.trace().to_records()


def _stream(hidden: Tensor, residual: Tensor | None) -> Float[Tensor, "n d"]:
    return hidden.float() if residual is None else hidden.float() + residual.float()


def _order(point: Point) -> tuple[int, bool]:
    """As a forward pass reaches them: what leaves a layer before what enters the next."""
    before = point.site == "hook_resid_pre"
    return point.layer - before, before


def _decoder_layers(worker: Any) -> list[torch.nn.Module]:
    count = worker.vllm_config.model_config.hf_text_config.num_hidden_layers
    modules = worker.model_runner.get_model().modules()
    found = [one for one in modules if isinstance(one, torch.nn.ModuleList) and len(one) == count]
    if len(found) != 1:
        expected, got = f"one list of {count} decoder layers", f"{len(found)} such lists"
        raise SiteError("the engine's model", expected=expected, got=got)
    return list(found[0])
