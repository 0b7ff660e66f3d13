"""One steered request between the steps of an engine, which runs its prompt in one piece or in several."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import FsteerError, HookError
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.session import Session, State
from fsteer_lens.method.gates import Reading
from fsteer_lens.models.points import Point
from fsteer_lens.serving.artefacts import KEY, NAME, Artefact
from fsteer_lens.serving.client import Record
from fsteer_lens.steering.steering import Steering
from fsteer_lens.trace.trace import Trace


class Request:
    """What was read of one steered request, what was decided on it, and how far each point has come.

    Attributes:
        key: what its trace can be asked for by.
        points: where it is read and edited.
        prompt_length: tokens of its prompt.
        error: why it cannot be steered; nothing is added to it any more, and its text is not to be sent.
    """

    def __init__(self, key: str, artefact: Artefact, arguments: Mapping[str, Any], prompt_length: int) -> None:
        self._steering = artefact.asked_for(arguments)
        self.key, self.points = str(arguments.get(KEY, key)), self._steering.points
        self.error: str | None = None
        self._artefact, self.prompt_length, self._last = artefact, prompt_length, prompt_length - 1
        self._session = Session(self._steering)
        self._session.begin(_one(self._last), _one(0))
        self._undecided = set(self.points)
        self._seen: dict[Point, int] = {}
        self._read: dict[Point, dict[Reading, Float[Tensor, " d"]]] = {}
        self._told: dict[str, Any] | None = None

    def edit(self, point: Point, stream: Float[Tensor, "n d"], done: int) -> Float[Tensor, "n d"] | None:
        """What to add to its tokens of one step at one point; None is nothing. Where that fails, `error` says why.

        Args:
            point: where.
            stream: the residual stream there before any edit, float32.
            done: how many of its tokens were computed before these.
        """
        if self.error is not None:
            return None
        try:
            return self._edit(point, stream, done)
        except FsteerError as error:
            self.error = str(error)
            return None

    def _edit(self, point: Point, stream: Tensor, done: int) -> Tensor | None:
        self._follow(point, done, len(stream))
        columns = torch.arange(done, done + len(stream), device=stream.device)
        real = torch.ones(1, len(stream), dtype=torch.bool, device=stream.device)
        view = View(columns, len(stream), False, _one(self._last, stream), _one(0, stream), real)
        waiting: list[State] = []
        if point in self._undecided:
            deciding = self._deciding(point)
            self._gather(point, stream, done)
            if done + len(stream) > self._last:
                self._decide(point, stream, view, deciding)
            else:
                waiting = deciding
        total = self._session.act(point, stream.unsqueeze(0), view, waiting)
        return None if total is None else total[0]

    def _follow(self, point: Point, done: int, n: int) -> None:
        """See that these tokens come after those that were seen, or again: an engine without room drops some."""
        seen = self._seen.get(point)
        whole = self._artefact.needs_prompts_whole
        if (seen is None and done and whole) or (seen is not None and done > seen):
            got = f"{n} after {done} that it did not see"
            raise HookError(f"{self._artefact.name} at {point.name}", expected="every token of the prompt", got=got)
        if point in self._undecided and self._artefact.needs_prompts_at_once and done + n <= self._last:
            expected, got = f"all {self._last + 1} tokens of the prompt at once", f"{n} of them"
            fix = "Start vLLM with --no-enable-chunked-prefill, or save the steering with scope='generated'."
            raise HookError(f"{self._artefact.name}, which edits prompts", expected=expected, got=got, fix=fix)
        if seen is not None and done < seen:
            self._session.take_back(point, seen - done)
            self._read.pop(point, None)
        self._seen[point] = done + n

    def _deciding(self, point: Point) -> list[State]:
        """The links at a point that decide on the prompt."""
        return [
            state
            for state, link in zip(self._session.states, self._steering.links, strict=True)
            if isinstance(link, Steering) and point in link.points
        ]

    def _gather(self, point: Point, stream: Tensor, done: int) -> None:
        """Read these tokens of the prompt: its last one, and the sum over all but the first."""
        held = self._read.setdefault(point, {})
        place = self._last - done
        if place < len(stream):
            held["last"] = stream[place]
        inside = stream[max(0, min(1, self._last) - done) : place + 1]
        held["mean"] = inside.sum(dim=0) + held.get("mean", 0)

    def _decide(self, point: Point, stream: Tensor, view: View, deciding: list[State]) -> None:
        held = self._read.pop(point)
        held["mean"] = held["mean"] / max(1, self._last)
        for state in deciding:
            assert isinstance(state.link, Steering)
            state.queries = state.queries or {"last": {}, "mean": {}}
            for read, query in held.items():
                state.queries[read][point.layer] = query.unsqueeze(0)
            state.link.open(state, point.layer, stream.unsqueeze(0), view)
        self._undecided.remove(point)

    def require_decided(self) -> None:
        """Note an error where the prompt is through and nobody has decided upon it somewhere."""
        if self._undecided and self.error is None:
            self.error = f"nobody decided at {', '.join(point.name for point in sorted(self._undecided))}"

    def record(self) -> dict[str, Any]:
        """What is known of it, as plain values: a `Record`, or the error."""
        if self.error is not None:
            return {NAME: self._artefact.name, "error": self.error}
        if self._told is None:
            links = self._steering.links
            strengths = tuple(getattr(link, "strength", None) for link in links)
            scopes = tuple(str(link.scope) if isinstance(link, Steering) else None for link in links)
            trace = self._session.trace.decisions()
            self._told = Record(self._artefact.name, self._artefact.digest, strengths, scopes, {}, trace).to_json()
        return {**self._told, "edited": self._edited()}

    def _edited(self) -> dict[str, int]:
        """Number of tokens that something was added to, by layer."""
        trace = self._session.trace
        changes = {layer: change for one in (*trace.parts, trace) for layer, change in one.change.items()}
        return {str(layer): int((change > 0).sum()) for layer, change in changes.items()}

    def trace(self) -> Trace:
        """All that was recorded, position by position, on the CPU."""
        return self._session.trace.cpu().preceded(max(self._seen.values(), default=0))


def _one(value: int, beside: Tensor | None = None) -> Tensor:
    return torch.tensor([value], dtype=torch.long, device="cpu" if beside is None else beside.device)
