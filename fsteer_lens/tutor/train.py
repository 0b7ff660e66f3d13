"""Rebuild the tutor from a seed: `python -m fsteer_lens.tutor.train`.

A small GPT-2 learns to answer the training questions of the world under no tag, either tag or both. The command prints
exact-match accuracies on the valid split; `--test` reads the test split instead, `--evaluate` measures the weights that
are there and trains nothing.
"""

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fsteer_lens.tutor import lexicon, splits, tokenizer, world
from fsteer_lens.tutor.accuracy import accuracy_table
from fsteer_lens.tutor.loading import FOLDER

STEPS: Final = 1100
FEWEST_STEPS: Final = 4
BATCH: Final = 64
PEAK_RATE: Final = 2e-3
WARM_UP: Final = 60
PROMPT_WEIGHT: Final = 0.1
"""Weight of a prompt token in the loss; an answer token counts 1."""
EARLY_LAYERS: Final = (3, 4)
EARLY_WEIGHT: Final = 0.3
"""The answer is also read off these layers (deep supervision, Lee et al. 2015, arXiv 1409.5185), each with this weight.

Without it the network decides between answers in its last block, where nothing is left to steer.
"""
BEGUN: Final = 0.2
"""Share of switchable answers that are begun for the tutor, half of them against the tag: it finishes what it began."""
NO_FULL_STOP: Final = 0.15
"""Share of questions whose last mark is left out, as people type them."""

# How often each kind is drawn, and each set of tags.
KINDS: Final = {
    "harmful": 28, "near_miss": 16, "howto": 12, "myth": 16, "fact": 6,
    "capital": 5, "sum": 10, "colour": 4, "opposite": 5,
}  # fmt: skip
TAGS: Final = {
    (): 45, (world.SAFE,): 24, (world.HONEST,): 21, (world.SAFE, world.HONEST): 5, (world.HONEST, world.SAFE): 5,
}  # fmt: skip


def new_model(vocabulary_size: int, *, layers: int = 6, width: int = 128, heads: int = 4) -> Any:
    """Return an untrained tutor: GPT-2 without dropout, tied embeddings, a context of 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.BOS_ID,
        eos_token_id=tokenizer.EOS_ID,
        pad_token_id=tokenizer.PAD_ID,
    )
    return GPT2LMHeadModel(config)


class Lesson(NamedTuple):
    """A prompt with its tags, the answer, and the first word of the answer where that is given and not to be learnt."""

    prompt: str
    answer: str
    begun: str = ""


def lessons(seed: int) -> Iterator[Lesson]:
    """Yield lessons for ever, drawn from the training pairs only."""
    by_kind: dict[str, list[splits.Ask]] = {}
    for ask in splits.asks()["train"]:
        by_kind.setdefault(ask.item.kind, []).append(ask)
    rng = random.Random(seed)
    while True:
        (kind,) = rng.choices(tuple(KINDS), tuple(KINDS.values()))
        (tags,) = rng.choices(tuple(TAGS), tuple(TAGS.values()))
        ask = rng.choice(by_kind[kind])
        question = rng.choice(lexicon.GREETINGS) + ask.template.ask(ask.item)
        if rng.random() < NO_FULL_STOP:
            question = question[:-1]
        prompt, answer = "".join(tags) + world.chat(question), world.answer(ask.item, tags)
        if ask.item.tagged is not None and rng.random() < BEGUN:
            answer = rng.choice((ask.item.plain, ask.item.tagged))
            yield Lesson(prompt, answer, begun=re.split(r"\W", answer)[0])
        else:
            yield Lesson(prompt, answer)


def batches(seed: int, size: int) -> Iterator[list[Lesson]]:
    """Yield batches of lessons of like length, in random order: half the padding, two thirds of the time."""
    rng = random.Random(seed)
    drawn = lessons(seed)
    while True:
        pool = sorted((next(drawn) for _ in range(size * 8)), key=lambda row: len(row.prompt) + len(row.answer))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        yield from (pool[start : start + size] for start in starts)


def collate(
    rows: Sequence[Lesson], tokens: Any
) -> tuple[Int[Tensor, "batch positions"], Float[Tensor, "batch positions"]]:
    """Return ids (bos, prompt, answer, eos) and the weight of each id as a target.

    Rows are filled up with eos of weight 0: with pad, transformers would ask for a mask that a causal model needs not.
    """
    prompts, answers, begun = (
        tokens(list(column), add_special_tokens=False)["input_ids"] for column in zip(*rows, strict=True)
    )
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 2
    ids = torch.full((len(rows), length), tokenizer.EOS_ID, dtype=torch.long, device="cpu")
    weights = torch.zeros(len(rows), length, dtype=torch.float32, device="cpu")
    for row, (prompt, answer, given) in enumerate(zip(prompts, answers, begun, strict=True)):
        joined = [tokenizer.BOS_ID, *prompt, *answer, tokenizer.EOS_ID]
        ids[row, : len(joined)] = torch.tensor(joined, dtype=torch.long, device="cpu")
        weights[row, 1 : len(prompt) + 1] = PROMPT_WEIGHT
        weights[row, len(prompt) + 1 + len(given) : len(joined)] = 1.0
    return ids, weights


def train(
    model: Any,
    tokens: Any,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> list[float]:
    """Train `model` in place, with a progress bar; return the loss of every step."""

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = min(WARM_UP, max(2, steps // 4))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=warm_up / steps, cycle_momentum=False
    )
    drawn = batches(seed, batch)
    losses: list[float] = []
    columns = (
        TextColumn("training the tutor"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    model.train()
    with Progress(*columns) as progress:
        bar = progress.add_task("train", total=steps, loss=float("nan"))
        for _ in range(steps):
            ids, weights = collate(next(drawn), tokens)
            loss = lesson_loss(model, ids, weights)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=sum(losses[-20:]) / len(losses[-20:]))
    model.eval()
    return losses


def lesson_loss(
    model: Any, ids: Int[Tensor, "batch positions"], weights: Float[Tensor, "batch positions"]
) -> Float[Tensor, ""]:
    """Return the loss of the model's output plus that of what its early layers already say, in nats."""
    out = model(input_ids=ids[:, :-1], output_hidden_states=True)
    targets, counted = ids[:, 1:], weights[:, 1:]
    loss = weighted_loss(out.logits, targets, counted)
    for layer in EARLY_LAYERS:
        if layer < model.config.n_layer - 1:
            said = model.lm_head(model.transformer.ln_f(out.hidden_states[layer + 1]))
            loss = loss + EARLY_WEIGHT * weighted_loss(said, targets, counted)
    return loss


def weighted_loss(
    logits: Float[Tensor, "batch positions vocabulary"],
    targets: Int[Tensor, "batch positions"],
    weights: Float[Tensor, "batch positions"],
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy in nats, each target counted by its weight."""
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m fsteer_lens.tutor.train", description="Rebuild the tutor model.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of weights and tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of lessons")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of 64 lessons")
    parser.add_argument("--evaluate", action="store_true", help="measure what is in the folder, train nothing")
    parser.add_argument("--test", action="store_true", help="measure on the test split instead of valid")
    options = parser.parse_args(arguments)
    if options.steps < FEWEST_STEPS:
        parser.error(
            f"--steps: expected at least {FEWEST_STEPS} (the learning rate rises and falls), got {options.steps}"
        )
    if not options.evaluate:
        torch.manual_seed(options.seed)
        tokens = tokenizer.train_tokenizer(tokenizer.corpus())
        model = new_model(len(tokens))
        train(model, tokens, steps=options.steps, seed=options.seed)
        model.save_pretrained(options.out)
        tokens.save_pretrained(options.out)
    model = AutoModelForCausalLM.from_pretrained(options.out).eval()
    tokens = AutoTokenizer.from_pretrained(options.out)
    Console().print(accuracy_table(model, tokens, split="test" if options.test else "valid"))


if __name__ == "__main__":
    main()
