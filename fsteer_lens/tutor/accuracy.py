"""How exactly the tutor says what its world says: greedy answers, compared word for word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from fsteer_lens.tutor import splits, tokenizer, world

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

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


def greedy_answers(model: "GPT2LMHeadModel", tokens: "PreTrainedTokenizerFast", prompts: Sequence[str]) -> list[str]:
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


def accuracies(
    model: "GPT2LMHeadModel", tokens: "PreTrainedTokenizerFast", *, split: str = "valid"
) -> Iterator[Accuracy]:
    """Yield exact-match counts over all questions of a split, by kind, tags and what is new about the question."""
    asked = splits.asks()[split]
    groups = {(ask.item.kind, ask.template.split == "train") for ask in asked}
    for tags in TAG_SETS:
        said = greedy_answers(model, tokens, ["".join(tags) + ask.prompt for ask in asked])
        right = [text == world.answer(ask.item, tags) for text, ask in zip(said, asked, strict=True)]
        for kind, seen in sorted(groups):
            mine = [
                ok
                for ok, ask in zip(right, asked, strict=True)
                if (ask.item.kind, ask.template.split == "train") == (kind, seen)
            ]
            yield Accuracy(kind, tags, "pair" if seen else "template", sum(mine), len(mine))


def accuracy_table(model: "GPT2LMHeadModel", tokens: "PreTrainedTokenizerFast", *, split: str = "valid") -> "Table":
    """Return the accuracies of a split as a table: a row for each kind, a column for each set of tags."""
    from rich.table import Table

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
