"""What the explorer's pictures are drawn from: every prompt at every rank, computed once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.explorer.settings import Subject
from fsteer_lens.figures.style import expert_colours, group_colours, plain
from fsteer_lens.ground.checks import optional, whole
from fsteer_lens.method.gates import OPEN, Reading
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import Prompt, prompt_text, prompts_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.reading.collecting import READING
from fsteer_lens.reading.reader import read_prompts

MOST_CHARACTERS = 2000
"""A longer prompt is cut where it is shown; what is generated reads all of it."""


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts of one name.

    Attributes:
        name: of the group.
        prompts: those that are shown.
        given: how many there were.
    """

    name: str
    prompts: tuple[Prompt, ...]
    given: int


@dataclass(frozen=True, eq=False)
class Pictured:
    """What the pictures are drawn from; rows are prompts, group after group.

    Attributes:
        groups: the prompts.
        queries: activations that the gate reads, [p d].
        scores: the gate's score at every rank, [p r]: energy ratios, of the first subspace of a composed gate. One
            column for a gate without ranks, none without a gate.
        opened: whether the gate as it is calibrated is open at every rank, [p r].
        thresholds: the calibrated threshold of every rank, [r]; None for a gate without a single one.
        logits: of the routing, of every expert, [p k].
        ranks: how many ranks there are to choose from; 0 for a gate without.
        score_name: what the score is.
        opens_above: whether the gate opens above its threshold.
    """

    groups: tuple[Group, ...]
    queries: Float[Tensor, "p d"]
    scores: Float[Tensor, "p r"]
    opened: Bool[Tensor, "p r"]
    thresholds: Float[Tensor, " r"] | None
    logits: Float[Tensor, "p k"]
    ranks: int
    score_name: str
    opens_above: bool

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that are shown, in the order of the rows."""
        return [prompt for group in self.groups for prompt in group.prompts]

    @property
    def by_group(self) -> dict[str, Float[Tensor, "_n d"]]:
        """The queries of each group."""
        sizes = [len(group.prompts) for group in self.groups]
        return dict(zip((group.name for group in self.groups), self.queries.split(sizes), strict=True))

    def message(self) -> dict[str, Any]:
        """All of it as the browser takes it: matrices as little-endian bytes, exact to the last bit, so that a
        threshold parts the prompts there as it does here."""
        colours = group_colours(len(self.groups))
        return {
            "groups": [
                {"name": shown(group.name), "size": len(group.prompts), "given": group.given, "colour": colour}
                for group, colour in zip(self.groups, colours, strict=True)
            ],
            "prompts": [shown(prompt_text(prompt)) for prompt in self.prompts],
            "experts": expert_colours(self.logits.shape[1]),
            "ranks": self.ranks,
            "columns": self.scores.shape[1],
            "score": self.score_name,
            "bounds": self._bounds(),
            "opens_above": self.opens_above,
            "scores": _bytes(self.scores.float(), "<f4"),
            "opened": _bytes(self.opened, "u1"),
            "logits": _bytes(self.logits.float(), "<f4"),
            "thresholds": None if self.thresholds is None else plain(self.thresholds, digits=6),
        }

    def row(self, index: int) -> dict[str, Any]:
        """One prompt as the browser takes it: scores and decisions at every rank, and logits of the experts."""
        scores, logits = (plain(values[index], digits=6) for values in (self.scores, self.logits))
        return {"scores": scores, "opened": self.opened[index].int().tolist(), "logits": logits}

    def _bounds(self) -> list[float]:
        """Ends of the scores' axis: 0 to 1 where all lie there, else what they and the thresholds span."""
        finite = self.scores[self.scores.isfinite()]
        if not len(finite) or (float(finite.min()) >= 0 and float(finite.max()) <= 1):
            return [0.0, 1.0]
        whole = finite if self.thresholds is None else torch.cat([finite, self.thresholds.to(finite)])
        low, high = (float(end) for end in whole.aminmax())
        margin = 0.02 * (high - low) or 0.5
        return [low - margin, high + margin]


def grouped(prompts: Any, limit: int | None) -> tuple[Group, ...]:
    """The groups of prompts, each cut to its first `limit`.

    Raises:
        InputError: no groups, an empty one, something that is no prompt, or no positive limit.
    """
    limit = optional(whole, "limit", limit, 1, why="or None for all")
    is_grouped = isinstance(prompts, Mapping) and "input_ids" not in prompts  # that is what a tokenizer gives
    named = prompts if is_grouped else {"prompts": prompts}
    if not named:
        raise InputError("prompts", expected="at least one group", got="none")
    groups = []
    for name, members in named.items():
        known = prompts_of(members, f"{name} prompt" if is_grouped else "prompt")
        groups.append(Group(str(name), tuple(known[:limit]), len(known)))
    return tuple(groups)


def read(subject: Subject, model: SteerableModel, groups: tuple[Group, ...], passes: Passes) -> Pictured:
    """Read the prompts' activations, and compute what the gate makes of them at every rank."""
    prompts = [prompt for group in groups for prompt in group.prompts]
    asked: Reading = subject.steering.read if subject.gate is None else subject.gate.read
    routed = subject.steering.read
    layers = sorted({subject.gate_layer, subject.layer})
    with passes.bar(len(prompts), READING) as advance:
        found = read_prompts(
            model, prompts, passes, layers, (asked, routed), site=subject.steering.site, advance=advance
        )
    return pictured(subject, groups, found[asked][subject.gate_layer], found[routed][subject.layer])


def pictured(
    subject: Subject, groups: tuple[Group, ...], queries: Float[Tensor, "p d"], routed: Float[Tensor, "p d"]
) -> Pictured:
    """Compute what the gate makes of `queries` at every rank, and the experts of `routed`."""
    gate, experts, ranks = subject.gate, subject.experts, subject.ranks
    scores, thresholds = torch.zeros(len(queries), 0, dtype=torch.float32, device="cpu"), None
    opened = torch.zeros(len(queries), 0, dtype=torch.bool, device="cpu")
    name = "" if gate is None else gate.score_name
    if gate is not None:
        opened = gate.gates(queries)[:, : max(1, ranks)].ge(OPEN).cpu()
        scores = gate.score(queries).unsqueeze(1).cpu()
        if ranks:
            scores, name = subject.leaves[0].subspace.energy_ratios(queries)[:, :ranks].cpu(), "energy ratio"
    if gate is not None and subject.has_threshold:
        at_ranks = [gate.at_rank(rank) for rank in range(1, ranks + 1)] or [gate]
        thresholds = torch.tensor([one.threshold for one in at_ranks], dtype=torch.float64, device="cpu")
    logits = experts.controller.logits(routed.to(experts.prototypes), experts.prototypes).cpu()
    above = gate is None or gate.opens_above
    return Pictured(groups, queries, scores, opened, thresholds, logits, ranks, name, above)


def _bytes(values: Tensor, dtype: str) -> bytes:
    return values.detach().cpu().numpy().astype(dtype).tobytes()


def shown(text: str) -> str:
    """A text as the browser gets it: cut where it is very long, and without lone surrogates, which no message holds."""
    whole = text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= MOST_CHARACTERS else whole[: MOST_CHARACTERS - 1] + "…"
