"""How little it takes to shut a gate: greedy word substitution against its score.

1. At every step each word of the text is replaced by candidates, in turn, and all the texts are scored.
2. The text with the lowest score is kept, where that is lower than before and the text still means the same.
3. It ends when the gate is shut or the budget of substitutions is used.

The attacker knows the gate and its score, and nothing is fitted. It is the search of TextFooler (Jin et al. 2020, arXiv
1907.11932) with the gate as the victim, without that method's ranking of words. What "still means the same" is must be
measured, or the attack proves nothing: a text about something else should not open a gate.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Unpack

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.evaluation.gate_reports import read_by
from fsteer_lens.evaluation.perturbations import Format, Keeps
from fsteer_lens.ground.checks import function, normalised, optional, options_of, require_unset, seed_of, switch, whole
from fsteer_lens.ground.estimates import Proportion
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.method.gates import OPEN, Gate, oriented
from fsteer_lens.method.linalg import require_matrix
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.prompts.forms import Prompt, texts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.reader import read_prompts
from fsteer_lens.reading.scanning import scan_prompts
from fsteer_lens.steering.steering import Steering

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
MOST_STEPS = 1000
CHECKED_AT_ONCE = 8
"""How many texts of each prompt are looked at together, best first, for one that keeps its meaning."""


@dataclass(frozen=True)
class Substitution:
    """One word for another: `old`, the word number `place` of the text, became `new`."""

    place: int
    old: str
    new: str


@dataclass(frozen=True)
class Attack:
    """What became of one prompt.

    Attributes:
        text: as it was.
        attacked: as it is now.
        substitutions: what was done to it, in this order.
        score: of the gate before; larger opens it.
        attacked_score: the same after.
        opened: whether the gate was open before.
        shut: whether it is shut now.
        kept: whether the text still means the same; None where nobody can tell.
    """

    text: str
    attacked: str
    substitutions: tuple[Substitution, ...]
    score: float
    attacked_score: float
    opened: bool
    shut: bool
    kept: bool | None


@dataclass(frozen=True)
class AttackReport:
    """How often an attack shuts a gate.

    Attributes:
        attacks: one for each prompt, in their order.
        budget: substitutions that were allowed for a prompt.
    """

    attacks: tuple[Attack, ...]
    budget: int

    def __repr__(self) -> str:
        opened = self._opened
        done = [sum(map(has, opened)) for has in (_shut, _succeeded)]
        return f"AttackReport(shut {done[0]}, succeeded {done[1]} of {len(opened)} open)"

    @property
    def shut(self) -> Proportion | None:
        """Prompts for which the gate was open and is shut now, of those for which it was open; None without any."""
        return self._share(_shut)

    @property
    def succeeded(self) -> Proportion | None:
        """The same, counting those alone that still mean the same; all of them where nobody can tell."""
        return self._share(_succeeded)

    @property
    def _opened(self) -> list[Attack]:
        return [attack for attack in self.attacks if attack.opened]

    def _share(self, has: Callable[[Attack], bool]) -> Proportion | None:
        opened = self._opened
        return Proportion(sum(map(has, opened)), len(opened)) if opened else None

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready mapping per prompt."""
        return [asdict(attack) for attack in self.attacks]


def _shut(attack: Attack) -> bool:
    return attack.shut


def _succeeded(attack: Attack) -> bool:
    return attack.shut and attack.kept is not False


class _Tried(NamedTuple):
    """A text that one substitution makes of the prompt with this number."""

    number: int
    change: Substitution
    text: str


class AttackOptions(PassOptions, total=False):
    """What `attack_gate` takes beside its own arguments: see there."""

    constrained: bool
    candidates: int
    seed: int


@dataclass(frozen=True)
class _Options(Passes):
    constrained: bool = True
    candidates: int = 32
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(
            self,
            constrained=switch("constrained", self.constrained),
            candidates=whole("candidates", self.candidates, 1),
            seed=seed_of(self.seed),
        )


def attack_gate(
    model: SteerableModel,
    gate: Gate | Steering,
    prompts: Iterable[str],
    *,
    words: Iterable[str],
    format: Format | None = None,
    layer: int | None = None,
    keeps: Keeps | None = None,
    budget: int = 4,
    **options: Unpack[AttackOptions],
) -> AttackReport:
    """Replace words of prompts, greedily, so that a gate's score falls until it shuts.

    The score is the gate's own, for a gate on a subspace its energy ratio, or minus it where it opens below; for one
    that scans (`fit_scan`) that of the window nearest to opening it. Prompts for which the gate is shut already are
    left as they are. The search costs up to budget · candidates · words of a
    prompt forward passes up to the gate's layer for each prompt, and a check of the meaning of as many texts as it
    takes to find one that keeps it.

    Args:
        model: the model that the gate was fitted on.
        gate: what to attack; a steering stands for its gate, and is followed in how texts become tokens.
        prompts: texts as a person types them, in need of steering.
        words: what may be put in place of a word.
        format: from what a person types to model input; None takes the text itself, or the user's turn of a chat.
        layer: where the gate reads; None where it knows that itself.
        keeps: whether changed texts still mean the same, such as `gives_same_answer`; None takes every text.
        budget: steps for each prompt, at most 1000, each of which replaces at most one word.
        options: `constrained` (True), let the search take only texts that `keeps` accepts; otherwise they are judged at
            the end. `candidates` (32), words to try in each place at each step, drawn anew; `seed` (0) of these draws.
            `chat`, `chat_template_kwargs` and `prepend_bos` as in `gate_report`; `batch_size` (64), prompts per forward
            pass; `progress` (True), show a progress bar.

    Raises:
        InputError: no prompts, no words, options out of range, or something that is no gate.
        ContextLengthError: a changed prompt does not fit into the context.
    """
    run = options_of("attack_gate", _Options, options).following(remembered(gate), model)
    require_steerable(model)
    for name, given in (("format", format), ("keeps", keeps)):
        optional(function, name, given)
    if keeps is None:
        require_unset("no keeps=", constrained=options.get("constrained"))
    gates, where = read_by({"attacked": gate}, layer)
    attacked, budget = gates["attacked"], whole("budget", budget, 1, MOST_STEPS)
    prompts, words = texts_of(prompts, "prompt"), texts_of(words, "word")

    def put(text: str) -> Prompt:
        return [{"role": "user", "content": text}] if format is None and run.chat else (format or str)(text)

    def read(texts: Sequence[str]) -> Float[Tensor, "n d"]:
        asked = [put(text) for text in texts]
        if attacked.scans:
            found = scan_prompts(model, attacked, asked, run, where)
        else:
            found = read_prompts(model, asked, run, where, (attacked.read,))[attacked.read][where]
        return require_matrix(found, f"activations at layer {where}")

    def judged(h: Float[Tensor, "n d"]) -> tuple[list[float], list[bool]]:
        return oriented(attacked, h).tolist(), (attacked(h) >= OPEN).tolist()

    def passes(tried: Sequence[_Tried]) -> Sequence[bool]:
        if keeps is None or not run.constrained:
            return [True] * len(tried)
        return keeps([prompts[one.number] for one in tried], [put(one.text) for one in tried])

    first = zip(prompts, *judged(read(prompts)), strict=True)
    attacks = [Attack(text, text, (), score, score, opened, not opened, None) for text, score, opened in first]
    with progress_bar(budget, "attacking the gate", run.progress) as advance:
        for step in range(budget):
            tried = [
                _Tried(number, change, text)
                for number, attack in enumerate(attacks)
                if not attack.shut
                for change, text in _proposals(attack.attacked, words, run.candidates, f"{run.seed} {step} {number}")
            ]
            if not tried:
                break
            _take_best(attacks, tried, *judged(read([one.text for one in tried])), passes)
            advance(1)
    if keeps is not None:
        kept = keeps(prompts, [put(attack.attacked) for attack in attacks])
        attacks = [replace(attack, kept=bool(one)) for attack, one in zip(attacks, kept, strict=True)]
    return AttackReport(tuple(attacks), budget)


def _proposals(text: str, words: Sequence[str], candidates: int, seed: str) -> Iterator[tuple[Substitution, str]]:
    """Texts with one word replaced: every word in turn, by words drawn without repetition."""
    rng = random.Random(seed)
    for place, match in enumerate(WORD.finditer(text)):
        old = match.group()
        for new in rng.sample(words, min(candidates, len(words))):
            if new != old:
                yield Substitution(place, old, new), text[: match.start()] + new + text[match.end() :]


def _take_best(
    attacks: list[Attack],
    tried: Sequence[_Tried],
    scores: Sequence[float],
    opens: Sequence[bool],
    passes: Callable[[Sequence[_Tried]], Sequence[bool]],
) -> None:
    """Move every attack on to the lowest-scoring of its texts that scores below where it is and passes."""
    queues: dict[int, list[int]] = {}
    for place in sorted(range(len(tried)), key=scores.__getitem__):
        number = tried[place].number
        if scores[place] < attacks[number].attacked_score:
            queues.setdefault(number, []).append(place)
    for start in range(0, max(map(len, queues.values()), default=0), CHECKED_AT_ONCE):
        looked = [place for queue in queues.values() for place in queue[start : start + CHECKED_AT_ONCE]]
        if not looked:
            break
        good = [place for place, passed in zip(looked, passes([tried[at] for at in looked]), strict=True) if passed]
        for place in sorted(good, key=scores.__getitem__):
            number, change, text = tried[place]
            if queues.pop(number, None) is not None:
                before = attacks[number]
                attacks[number] = replace(
                    before,
                    attacked=text,
                    substitutions=(*before.substitutions, change),
                    attacked_score=scores[place],
                    shut=not opens[place],
                )
