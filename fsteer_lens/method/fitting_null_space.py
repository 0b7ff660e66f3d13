"""The fit of a `NullSpaceGate`: a linear map that general queries do not reach, and what it leaves on their domains.

1. c: the mean of the general queries, every domain of them counting alike.
2. w minimises, over queries h that need steering and general ones x,

       mean (w·(h − c) − 1)² + mean (w·(x − c))² + ridge · ‖w‖²

   Without the ridge, and where general queries leave directions free, w lies in their null space. They do not leave any
   free for good, since a new one is never quite in the span of the others, so the second term weighs each direction by
   how far general queries reach into it, in place of a projector that takes it or leaves it. The weight of the ridge is
   that of the least error on held-out queries.
3. On queries held out of the fit: 0 is where all but 5 % of every general domain lie below, 1 the median of the queries
   that need steering. What lies beyond is cut off.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import DataError
from fsteer_lens.ground.checks import optional_text, seed_of, several, whole
from fsteer_lens.method.folds import Fold, cut_folds
from fsteer_lens.method.linalg import move, require_matrix
from fsteer_lens.method.null_space import DomainShare, NullSpaceGate

STRENGTHS: Final = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Weights of the ridge that are tried, in units of the mean eigenvalue."""
QUIET: Final = 0.95
"""Share of each general domain that gets nothing at all."""
FULL: Final = 0.5
"""Share of the queries that need steering that get less than all of it."""
STEEPEST: Final = 0.25
"""The least part of the way from 0 to 1 on which the map rises: where less lies between the two kinds, it stays low."""
MAX_DOMAINS: Final = 50
KEPT: Final = 0.5
"""Where less than this is left on queries that need steering, the fit warns."""


class _Split(NamedTuple):
    """Queries that need steering, general ones and the domain of each of these, fold by fold."""

    wanted: Float[Tensor, "n p"]
    others: Float[Tensor, "m p"]
    domain: Int[Tensor, " m"]
    wanted_folds: Sequence[Fold]
    other_folds: Sequence[Fold]


class _HeldOut(NamedTuple):
    """w·(h − c) of queries that w was not fitted to, at the weight of the ridge that suits them best."""

    strength: float
    wanted: Float[Tensor, " n"]
    others: Float[Tensor, " m"]


class _Ends(NamedTuple):
    """Where the map is 0 and where it is 1."""

    low: float
    high: float

    def cut(self, scores: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The map of w·(h − c)."""
        return ((scores - self.low) / (self.high - self.low)).clamp(0, 1)


def fit_null_space_gate(
    queries: Float[Tensor, "n d"],
    general: Float[Tensor, "m d"],
    *,
    domains: Iterable[str | None] | None = None,
    groups: Sequence[str | None] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> NullSpaceGate:
    """Fit the map; `fit_gate(kind="null_space")` is the way to it.

    Args:
        queries: activations of queries that need steering, [n d].
        general: activations of queries to be left alone, [m d].
        domains: of each general query the domain that it is from; None is one domain of its own.
        groups: fold group of each of `queries`.
        folds: for the weight of the ridge, the ends of the map and what is reported, at most.
        seed: of random folds.

    Raises:
        InputError: options out of range.
        ShapeError, NonFiniteError: no finite floating matrices of one width, or fewer than two rows.
        DataError: not one domain a row, more than 50 of them, or groups that cannot be cut into folds.
    """
    wanted = require_matrix(queries, "queries", min_rows=2)
    others = require_matrix(general, "general", d_model=wanted.shape[1], min_rows=2).to(wanted)
    folds, seed = whole("folds", folds, 2), seed_of(seed)
    names, domain = _domains(domains, len(others))
    basis = _span(torch.cat([wanted, others]).double())
    data = _Split(
        wanted.double() @ basis,
        others.double() @ basis,
        domain.to(wanted.device),
        [move(fold, wanted.device) for fold in cut_folds(len(wanted), groups, folds, seed)],
        [move(fold, wanted.device) for fold in cut_folds(len(others), None, folds, seed)],
    )
    held_out = _cross_fitted(data, STRENGTHS)
    ends = _ends(held_out, data.domain)
    centre, direction = _solve(data.wanted, data.others, _weights(data.domain), held_out.strength)
    slope = basis @ direction / (ends.high - ends.low)
    bias = -(float(centre @ direction) + ends.low) / (ends.high - ends.low)
    kept = float(ends.cut(held_out.wanted).mean())
    left = ends.cut(held_out.others)
    shares = tuple(
        DomainShare(
            name,
            int((data.domain == index).sum()),
            float(left[data.domain == index].mean()),
            _left_out(data, index, held_out.strength) if len(names) > 1 else None,
        )
        for index, name in enumerate(names)
    )
    _warn(kept, shares)
    return NullSpaceGate(slope.to(wanted), bias, kept=kept, domains=shares)


def _domains(given: Iterable[str | None] | None, n: int) -> tuple[list[str], Int[Tensor, " n"]]:
    """The names of all domains, and the number of that of each row."""
    told = f"one for each of {n} general queries"
    found = [None] * n if given is None else [optional_text("domain", one) for one in several("domains", given, told)]
    if len(found) != n:
        raise DataError("domains", expected=told, got=len(found))
    names = list(dict.fromkeys(found))
    if len(names) > MAX_DOMAINS:
        fix = "Let a label of the general queries name where they are from, not what each of them is."
        raise DataError("domains", expected=f"at most {MAX_DOMAINS}", got=len(names), fix=fix)
    number = {name: index for index, name in enumerate(names)}
    rows = torch.tensor([number[name] for name in found], dtype=torch.long, device="cpu")
    return ["general" if len(names) == 1 else "no label" if name is None else name for name in names], rows


def _span(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d p"]:
    """An orthonormal basis of what holds all rows: w lies within it, and it is narrow where rows are few."""
    n, d_model = rows.shape
    if n >= d_model:
        return torch.eye(d_model, dtype=rows.dtype, device=rows.device)
    return torch.linalg.qr(rows.T).Q


def _weights(domain: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Weights of general queries that sum to 1, and to the same in every domain."""
    sizes = torch.bincount(domain).double()
    return 1 / (sizes[domain] * (sizes > 0).sum())


def _solve(
    wanted: Float[Tensor, "n p"], others: Float[Tensor, "m p"], weights: Float[Tensor, " m"], *strengths: float
) -> tuple[Float[Tensor, " p"], Float[Tensor, "*strengths p"]]:
    """c, and w for every weight of the ridge; for a single one w alone."""
    centre = weights @ others
    away, near = wanted - centre, others - centre
    gram = away.T @ away / len(away) + near.T @ (weights.unsqueeze(1) * near)
    unit = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found = [torch.linalg.solve(gram + strength * unit * identity, away.mean(dim=0)) for strength in strengths]
    return centre, found[0] if len(found) == 1 else torch.stack(found)


def _cross_fitted(data: _Split, strengths: Sequence[float]) -> _HeldOut:
    """What maps give that did not see a query, at the weight with the least error; ties go to the larger one."""
    wanted = data.wanted.new_zeros(len(strengths), len(data.wanted))
    others = data.others.new_zeros(len(strengths), len(data.others))
    for index in range(max(len(data.wanted_folds), len(data.other_folds))):
        # where one kind has fewer folds than the other, these are gone through again
        train, held_out = data.wanted_folds[index % len(data.wanted_folds)]
        general, left = data.other_folds[index % len(data.other_folds)]
        rows = data.others[general]
        centre, directions = _solve(data.wanted[train], rows, _weights(data.domain[general]), *strengths)
        wanted[:, held_out] = directions.reshape(len(strengths), -1) @ (data.wanted[held_out] - centre).T
        others[:, left] = directions.reshape(len(strengths), -1) @ (data.others[left] - centre).T
    errors = (wanted - 1).square().mean(dim=1) + others.square() @ _weights(data.domain)
    best = max(range(len(strengths)), key=lambda index: (-float(errors[index]), strengths[index]))
    return _HeldOut(strengths[best], wanted[best], others[best])


def _ends(held_out: _HeldOut, domain: Int[Tensor, " m"]) -> _Ends:
    """0 above nearly all of each domain, 1 in the middle of what needs steering."""
    low = max(float(held_out.others[domain == index].quantile(QUIET)) for index in domain.unique())
    return _Ends(low, max(float(held_out.wanted.quantile(FULL)), low + STEEPEST))


def _left_out(data: _Split, index: int, strength: float) -> float:
    """Mean of the map over one domain, had it been fitted without that."""
    rest = data.domain != index
    place = rest.cumsum(dim=0) - 1  # of a row among those that are left
    folds = [(place[a[rest[a]]], place[b[rest[b]]]) for a, b in data.other_folds]
    folds = [(train, held_out) for train, held_out in folds if len(train) and len(held_out)]
    others, domain = data.others[rest], data.domain[rest]
    if not folds:
        folds = [(torch.arange(len(others), device=others.device),) * 2]
    without = _cross_fitted(data._replace(others=others, domain=domain, other_folds=folds), (strength,))
    ends = _ends(without, domain)
    centre, direction = _solve(data.wanted, others, _weights(domain), strength)
    return float(ends.cut((data.others[~rest] - centre) @ direction).mean())


def _warn(kept: float, shares: Sequence[DomainShare]) -> None:
    """Tell where the map cannot do what it is for, and where nobody can tell what it leaves alone."""
    if kept < KEPT:
        warnings.warn(
            f"the null space leaves {kept:.2f} of the steering to queries that need it: they are made of what general"
            " queries are made of. Take the general queries that look most like them out, or use another layer",
            stacklevel=4,
        )
    if len(shares) < 2:
        warnings.warn(
            "general queries of one domain: the map leaves alone what looks like them, and what it does to others is"
            " unknown. Give queries of several domains and name these, collect_queries(labels=)",
            stacklevel=4,
        )
