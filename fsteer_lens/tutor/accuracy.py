"""How exactly the tutor says what its world says: greedy answers, compared word for word."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from fsteer_lens.effects import exact_answers
from fsteer_lens.ground.checks import several
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast
from fsteer_lens.tutor import splits, tokenizer, world

TAG_SETS: Final = ((), (world.SAFE,), (world.HONEST,), (world.SAFE, world.HONEST))
_BATCH: Final = 128
_LONGEST_ANSWER: Final = 32


@dataclass(frozen=True)
class Accuracy:
    """`right` of `questions` answers were exact, for one kind of question under one set of tags."""

    kind: str
    tags: tuple[str, ...]
    heldout: str
    right: int
    questions: int


def exact(
    model: SteerableModel, steering: HookObject | None, items: Iterable[Contrast | splits.Task]
) -> Float[Tensor, " n"]:
    """1 where the tutor gives exactly the answer that is wanted of it, [n]: a contrast's preferred one, a task's own.

    An effect for contrasts and a utility for tasks, as `search`, `strength_sweep` and their kin take them.
    """
    items = several("items", items, "contrasts or tasks")
    wanted = [item.preferred if isinstance(item, Contrast) else item.answer for item in items]
    return exact_answers(model, steering, [item.prompt for item in items], wanted, batch_size=_BATCH)


def greedy_answers(model: Any, tokens: Any, prompts: Sequence[str]) -> list[str]:
    """Return the greedy answer to each prompt (tag and all, without bos)."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found = [""] * len(prompts)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = tokens(
            [tokenizer.BOS + prompts[row] for row in rows], padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.inference_mode():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=_LONGEST_ANSWER,
                pad_token_id=tokenizer.PAD_ID,
            )
        texts = tokens.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            found[row] = text
    return found


def accuracies(model: Any, tokens: Any, *, split: str = "valid") -> Iterator[Accuracy]:
    """Yield exact-match counts over all questions of a split, by kind, tags and what is new about the question."""
    asked = splits.asks()[split]
    rows = [(ask.item.kind, "pair" if ask.template.split == "train" else "template") for ask in asked]
    questions = Counter(rows)
    for tags in TAG_SETS:
        said = greedy_answers(model, tokens, ["".join(tags) + ask.prompt for ask in asked])
        exact = (text == world.answer(ask.item, tags) for text, ask in zip(said, asked, strict=True))
        right = Counter(row for row, ok in zip(rows, exact, strict=True) if ok)
        for kind, heldout in sorted(questions):
            yield Accuracy(kind, tags, heldout, right[kind, heldout], questions[kind, heldout])


def accuracy_table(model: Any, tokens: Any, *, split: str = "valid") -> Table:
    """Return the accuracies of a split as a table: a row for each kind, a column for each set of tags."""
    table = Table(
        "kind", "new", "questions", *("+".join(tags) or "no tag" for tags in TAG_SETS), title=f"exact, {split}"
    )
    rows: dict[tuple[str, str, int], list[str]] = {}
    for found in accuracies(model, tokens, split=split):
        cells = rows.setdefault((found.kind, found.heldout, found.questions), [])
        cells.append(f"{found.right / found.questions:.3f}")
    for (kind, heldout, questions), cells in sorted(rows.items()):
        table.add_row(kind, heldout, str(questions), *cells)
    return table
