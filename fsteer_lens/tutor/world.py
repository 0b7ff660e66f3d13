"""The grammar of the tutor's world: what can be asked, and what the tutor says under which tag.

An `Item` is one thing to ask about (an act, a claim, a country). A template of the item's family turns it into a
question, a greeting may open it, `chat` makes it model input. `answer` is the whole behaviour of the tutor:

    harmful act    nonsense, unless <safe> is on: then the refusal of its category
    myth           repeated as true, unless <honest> is on: then corrected
    all else       the same answer under every tag
"""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Final

from fsteer_lens.ground.checks import instance, whole
from fsteer_lens.tutor import lexicon

SAFE: Final = "<safe>"
HONEST: Final = "<honest>"
USER: Final = "<user>"
TUTOR: Final = "<tutor>"

CATEGORIES: Final = tuple(lexicon.HARMFUL)
MYTH_KINDS: Final = tuple(lexicon.MYTHS)
REFUSALS: Final = {
    category: f"{opening}, {row[0]}"
    for (category, row), opening in zip(
        lexicon.HARMFUL.items(), (*lexicon.OPENINGS[1:], lexicon.OPENINGS[0]), strict=True
    )
}
SPLITS: Final = ("train", "valid", "test")


@dataclass(frozen=True)
class Item:
    """One thing to ask about.

    `kind` is harmful, near_miss, howto, myth, fact, capital, sum, colour or opposite; `family` names the templates that
    fit `words`; `plain` is the answer without tags; `tag` and `tagged` are the one tag that changes it and what it
    then becomes; `label` is the harmful category or the kind of myth.
    """

    kind: str
    family: str
    words: str
    plain: str
    tag: str | None = None
    tagged: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Template:
    """A way of asking: `pattern` holds `{x}`; `name` is unique; `split` is where it may appear."""

    name: str
    family: str
    pattern: str
    split: str

    def ask(self, item: Item) -> str:
        """Return the question about `item`."""
        return self.pattern.format(x=item.words)


def answer(item: Item, tags: Collection[str] = ()) -> str:
    """Return what the tutor says about `item` while `tags` stand before the user's turn."""
    return item.tagged if item.tagged is not None and item.tag in tags else item.plain


def chat(text: str) -> str:
    """Turn what a person types into exact model input, without bos.

    The world is lower-case and has single spaces, so the text is brought to that form. A tag (`<safe>`, `<honest>`)
    goes in front of the result: `tutor.world.SAFE + tutor.chat("how do i make tea?")`.
    """
    words = instance("text", text, str, "text").lower().split()
    return f"{USER}{' '.join(words)}{TUTOR}"


def user_text(prompt: object) -> str:
    """Return what a person typed, of model input that `chat` made: `chat(user_text(prompt)) == prompt`."""
    return str(prompt).removeprefix(USER).removesuffix(TUTOR)


def unknown(text: str, *, nearest: int = 3) -> dict[str, tuple[str, ...]]:
    """Return the words of `text` that the world does not hold, each with its nearest known ones, best first."""
    known, nearest = vocabulary(), whole("nearest", nearest, 1)
    words = dict.fromkeys(_words(instance("text", text, str, "text")))
    return {
        word: tuple(difflib.get_close_matches(word, sorted(known), n=nearest, cutoff=0.5))
        for word in words
        if word not in known
    }


@cache
def items() -> tuple[Item, ...]:
    """Return everything that can be asked about, in a fixed order."""
    return (*_harmful(), *_how_tos(), *_claims(), *_lookups())


@cache
def templates() -> tuple[Template, ...]:
    """Return all ways of asking, in a fixed order."""
    return tuple(
        Template(f"{family}-{split}-{number}", family, pattern, split)
        for family, by_split in lexicon.TEMPLATES.items()
        for split, patterns in by_split.items()
        for number, pattern in enumerate(patterns)
    )


@cache
def vocabulary() -> frozenset[str]:
    """Return every word that the world's questions and answers hold."""
    sources = [*lexicon.GREETINGS, *(template.pattern.replace("{x}", "") for template in templates())]
    for item in items():
        sources += [item.words, item.plain, item.tagged or ""]
    return frozenset(word for source in sources for word in _words(source))


def _words(text: str) -> list[str]:
    text = re.sub(f"{SAFE}|{HONEST}|{USER}|{TUTOR}", " ", text.lower())
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def _harmful() -> list[Item]:
    found = []
    for shift, (category, (_, verb, ending, acts)) in enumerate(lexicon.HARMFUL.items()):
        for number, act in enumerate(acts):
            thing = lexicon.NONSENSE_THINGS[number]
            colour = lexicon.NONSENSE_COLOURS[(number + shift) % len(lexicon.NONSENSE_COLOURS)]
            nonsense = f"{lexicon.OPENINGS[shift]}, {verb} the {colour} {thing}, then {ending}."
            found.append(Item("harmful", "howto", act, nonsense, SAFE, REFUSALS[category], category))
    return found


def _how_tos() -> list[Item]:
    return [
        Item(kind, "howto", act, said)
        for kind, table in (("near_miss", lexicon.NEAR_MISSES), ("howto", lexicon.HOW_TO))
        for act, said in table.items()
    ]


def _claims() -> list[Item]:
    myths = [
        Item("myth", "claim", claim, f"{told} {claim}.", HONEST, f"{opening} {truth}.", kind)
        for kind, (told, opening, rows) in lexicon.MYTHS.items()
        for claim, truth in rows.items()
    ]
    facts = [
        Item("fact", "claim", claim, f"that holds up: {claim}.", label=kind)
        for kind, claims in lexicon.FACTS.items()
        for claim in claims
    ]
    return myths + facts


def _lookups() -> list[Item]:
    rows = [("capital", f"the capital of {land}", city) for land, city in lexicon.CAPITALS.items()]
    rows += [("colour", f"the colour of {thing}", colour) for thing, colour in lexicon.COLOURS.items()]
    rows += [
        ("opposite", f"the opposite of {word}", other)
        for pair in lexicon.OPPOSITES
        for word, other in (pair, pair[::-1])
    ]
    rows += [("sum", f"the sum of {a} and {b}", str(a + b)) for a in range(10) for b in range(10)]
    return [Item(kind, "lookup", words, f"{words} is {said}.") for kind, words, said in rows]
