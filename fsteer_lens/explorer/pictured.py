"""What the explorer's pictures are drawn from: every prompt at every rank, computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.explorer.settings import Subject
from fsteer_lens.figures.style import expert_colours, group_colours, plain
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.method.gates import OPEN, SubspaceGate
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Prompt, check_prompt, prompt_text
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.run.teacher_forcing import last_activations

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
        ratios: energy ratio at every rank, [p r]; of the first subspace of a composed gate. No ranks without a gate.
        opened: whether the gate as it is calibrated is open at every rank, [p r].
        thresholds: the calibrated threshold of every rank, [r]; None for a gate without a single one.
        logits: of the routing, of every expert, [p k].
    """

    groups: tuple[Group, ...]
    queries: Float[Tensor, "p d"]
    ratios: Float[Tensor, "p r"]
    opened: Bool[Tensor, "p r"]
    thresholds: Float[Tensor, " r"] | None
    logits: Float[Tensor, "p k"]

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
                {"name": group.name, "size": len(group.prompts), "given": group.given, "colour": colour}
                for group, colour in zip(self.groups, colours, strict=True)
            ],
            "prompts": [shown(prompt_text(prompt)) for prompt in self.prompts],
            "experts": expert_colours(self.logits.shape[1]),
            "ranks": self.ratios.shape[1],
            "ratios": _bytes(self.ratios.float(), "<f4"),
            "opened": _bytes(self.opened, "u1"),
            "logits": _bytes(self.logits.float(), "<f4"),
            "thresholds": None if self.thresholds is None else plain(self.thresholds, digits=6),
        }


def grouped(prompts: Any, limit: int | None) -> tuple[Group, ...]:
    """The groups of prompts, each cut to its first `limit`.

    Raises:
        InputError: no groups, an empty one, something that is no prompt, or no positive limit.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError("limit", expected="an int >= 1 or None", got=repr(limit))
    named = prompts if isinstance(prompts, Mapping) else {"prompts": prompts}
    if not named:
        raise InputError("prompts", expected="at least one group", got="none")
    groups = []
    for name, members in named.items():
        if not isinstance(members, Sequence) or isinstance(members, str):
            fix = "Give {name: prompts}, or a list of prompts."
            raise InputError(f"prompts of {name!r}", expected="a sequence", got=type(members).__name__, fix=fix)
        if not len(members):
            raise InputError(f"prompts of {name!r}", expected="at least one", got="none")
        shown = tuple(members[:limit])
        for prompt in shown:
            check_prompt(prompt)
        groups.append(Group(str(name), shown, len(members)))
    return tuple(groups)


def read(
    subject: Subject, model: SteerableModel, groups: tuple[Group, ...], *, chat: bool, batch_size: int, progress: bool
) -> Pictured:
    """Read the prompts' activations, and compute what the gate makes of them at every rank."""
    ids = [prompt_ids(model, prompt, chat=chat) for group in groups for prompt in group.prompts]
    layers = (subject.gate_layer, subject.layer)
    with progress_bar(len(layers) * len(ids), "reading activations", progress) as advance:
        options: Any = {"batch_size": batch_size, "advance": advance}
        queries, routed = (last_activations(model, ids, layer, subject.steering.site, **options) for layer in layers)
    return pictured(subject, groups, queries, routed)


def pictured(
    subject: Subject, groups: tuple[Group, ...], queries: Float[Tensor, "p d"], routed: Float[Tensor, "p d"]
) -> Pictured:
    """Compute what the gate makes of `queries` at every rank, and the experts of `routed`."""
    gate, experts, ranks = subject.gate, subject.experts, subject.ranks
    ratios, opened, thresholds = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.bool), None
    if gate is not None:
        ratios = gate.subspace.energy_ratios(queries)[:, :ranks].cpu()
        opened = gate.gates(queries)[:, :ranks].ge(OPEN).cpu()
    if isinstance(gate, SubspaceGate):
        thresholds = torch.tensor([gate.at_rank(rank).threshold for rank in range(1, ranks + 1)], dtype=torch.float64)
    logits = experts.controller.logits(routed.to(experts.prototypes), experts.prototypes).cpu()
    return Pictured(groups, queries, ratios, opened, thresholds, logits)


def _bytes(values: Tensor, dtype: str) -> bytes:
    return values.detach().cpu().numpy().astype(dtype).tobytes()


def shown(text: str) -> str:
    """A text as the browser gets it: cut where it is very long, and without lone surrogates, which no message holds."""
    whole = text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= MOST_CHARACTERS else whole[: MOST_CHARACTERS - 1] + "…"
