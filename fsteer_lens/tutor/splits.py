"""Which questions belong to train, valid and test, and the typed sets that are made of them.

The unit that is held out is an (item, template) pair. Some templates appear in valid or in test only; of the pairs of
the training templates, a few of every item go to valid and a few to test. So a test prompt asks a known thing in a way
that training never showed: either this thing was never asked this way ("pair"), or nothing was ("template").
"""

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import brief, choice, whole
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.tutor import lexicon, world

SPLIT_SEED: Final = 0
"""The shipped weights saw the training part of this split, and of no other."""

BEHAVIOURS: Final = {"safe": world.SAFE, "honest": world.HONEST}

_HELD_OUT_PAIRS: Final = {"howto": 2, "claim": 2, "lookup": 1}
_NEAR_MISS: Final = {"safe": "near_miss", "honest": "fact"}
_GENERAL_PER_KIND: Final = {"train": 60, "valid": 40, "test": 40}
_NEAR_MISSES: Final = 90


@dataclass(frozen=True)
class Ask:
    """One item asked in one way; `prompt` is exact model input without bos and tag."""

    item: world.Item
    template: world.Template
    prompt: str


@dataclass(frozen=True)
class Task:
    """A prompt whose answer no tag may change; `group` is its template."""

    prompt: str
    answer: str
    kind: str
    group: str


@dataclass(frozen=True, eq=False)
class TutorData:
    """The sets of one behaviour.

    `train`, `valid` and `test` are the prompts that need intervention, `general_*` those that do not, and
    `near_miss_*` those that do not and look as if they did: harmless acts in the words of harm for "safe", true claims
    in the templates of the myths for "honest". Training near misses are part of `general_train`.
    """

    behaviour: str
    train: ContrastSet
    valid: ContrastSet
    test: ContrastSet
    general_train: list[Task] = field(repr=False)
    general_valid: list[Task] = field(repr=False)
    general_test: list[Task] = field(repr=False)
    near_miss_valid: list[Task] = field(repr=False)
    near_miss_test: list[Task] = field(repr=False)

    def heldout(self, example: Contrast | Task) -> str:
        """Say what is new in a valid or test example: "pair" (a training template), or the whole "template"."""
        if not isinstance(example, Contrast | Task):
            raise InputError("example", expected="a contrast or a task of the tutor's", got=brief(example))
        return "pair" if example.group in _training_groups() else "template"


def data(behaviour: str = "safe", *, split_seed: int = SPLIT_SEED) -> TutorData:
    """Return the sets of a behaviour, "safe" or "honest".

    Every prompt is exact model input without bos. A contrast's context is the tag, to be put before the prompt
    verbatim; preferred and undesired are the exact answers with and without it; label is the harmful category or the
    kind of myth; group is the template. Only the default `split_seed` fits the shipped weights: under another one they
    have seen test questions in training.

    Raises:
        InputError: an unknown behaviour, or a seed that is no whole number.
    """
    choice("behaviour", behaviour, BEHAVIOURS)
    split_seed = whole("split_seed", split_seed)
    tag, near_kind = BEHAVIOURS[behaviour], _NEAR_MISS[behaviour]
    sets: dict[str, ContrastSet] = {}
    general: dict[str, list[Task]] = {}
    near: dict[str, list[Task]] = {}
    for split, asked in asks(split_seed).items():
        sets[split] = ContrastSet(_contrast(ask, tag) for ask in asked if ask.item.tag == tag)
        kinds: dict[str, list[Ask]] = {}
        for ask in asked:
            if ask.item.tag != tag:
                kinds.setdefault(ask.item.kind, []).append(ask)
        rng = random.Random(f"{split_seed} {behaviour} {split}")
        near[split] = _draw(kinds[near_kind] if split == "train" else kinds.pop(near_kind), _NEAR_MISSES, rng)
        general[split] = [task for rows in kinds.values() for task in _draw(rows, _GENERAL_PER_KIND[split], rng)]
    return TutorData(
        behaviour,
        train=sets["train"],
        valid=sets["valid"],
        test=sets["test"],
        general_train=general["train"],
        general_valid=general["valid"],
        general_test=general["test"],
        near_miss_valid=near["valid"],
        near_miss_test=near["test"],
    )


@cache
def asks(split_seed: int = SPLIT_SEED) -> dict[str, tuple[Ask, ...]]:
    """Return every question of every split, each with one greeting."""
    rng = random.Random(split_seed)
    found: dict[str, list[Ask]] = {split: [] for split in world.SPLITS}
    for item in world.items():
        fitting = [template for template in world.templates() if template.family == item.family]
        seen = [template for template in fitting if template.split == "train"]
        held_out = _HELD_OUT_PAIRS[item.family]
        rng.shuffle(seen)
        where = {template: template.split for template in fitting}
        where |= dict.fromkeys(seen[:held_out], "valid") | dict.fromkeys(seen[held_out : 2 * held_out], "test")
        for template, split in where.items():
            greeting = rng.choice(lexicon.GREETINGS)
            found[split].append(Ask(item, template, world.chat(greeting + template.ask(item))))
    return {split: tuple(rows) for split, rows in found.items()}


@cache
def _training_groups() -> frozenset[str]:
    return frozenset(template.name for template in world.templates() if template.split == "train")


def _contrast(ask: Ask, tag: str) -> Contrast:
    return Contrast(
        ask.prompt,
        preferred=world.answer(ask.item, {tag}),
        undesired=world.answer(ask.item),
        label=ask.item.label,
        context=tag,
        group=ask.template.name,
    )


def _draw(asked: list[Ask], count: int, rng: random.Random) -> list[Task]:
    drawn = rng.sample(asked, min(count, len(asked)))
    return [Task(ask.prompt, world.answer(ask.item), ask.item.kind, ask.template.name) for ask in drawn]
