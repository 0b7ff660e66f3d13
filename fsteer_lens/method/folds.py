"""Folds for cross-fitting, cut by group where groups are given."""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor

from fsteer_lens.errors import DataError

FOLDS: Final = 5
Fold = tuple[Int[Tensor, "_"], Int[Tensor, "_"]]  # "_": folds need not be of one size


def cut_folds(n: int, groups: Sequence[str | None] | None, folds: int, seed: int) -> list[Fold]:
    """Rows to fit on and rows that are held out, for each fold; every row is held out once.

    Args:
        n: number of rows.
        groups: group of every row, which is never split; None, or None for every row: random folds.
        folds: how many, at most; there are no more than rows or groups.
        seed: of the random folds; those by group are the same for every seed.

    Raises:
        DataError: not one group for each row, or a single group.
    """
    from sklearn.model_selection import GroupKFold, KFold

    if groups is None or all(group is None for group in groups):
        splits = KFold(min(folds, n), shuffle=True, random_state=seed).split(range(n))
    else:
        if len(groups) != n or any(group is None for group in groups):
            raise DataError(
                "groups",
                expected=f"a group for each of {n} queries",
                got=f"{len(groups)} groups, {sum(group is None for group in groups)} of them None",
                fix="Give every contrast a group=, or none of them.",
            )
        n_groups = len(set(groups))
        if n_groups < 2:
            raise DataError(
                "groups", expected="at least 2 different groups", got=n_groups, fix="Give several groups, or none."
            )
        splits = GroupKFold(min(folds, n_groups)).split(range(n), groups=groups)
    return [(torch.from_numpy(train), torch.from_numpy(held_out)) for train, held_out in splits]


def halves(n: int, groups: Sequence[str | None] | None, seed: int) -> Fold:
    """Rows in two random halves, groups kept whole where there are at least two of them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    names = list(range(n)) if groups is None or len(set(groups)) < 2 else list(groups)
    known = sorted(set(names), key=str)
    order = torch.randperm(len(known), generator=generator, device="cpu").tolist()
    first = {known[index] for index in order[: len(known) // 2]}
    chosen = torch.tensor([name in first for name in names], dtype=torch.bool, device="cpu")
    return chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
