"""What steering costs: divergence on general prompts, and answers that go round in circles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError
from fsteer_lens.evaluation.suites import Measure, Setting, Suite
from fsteer_lens.ground.checks import normalised, options_of, several, whole
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import texts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.run.generation import generate
from fsteer_lens.run.repetition import NGRAM, repeats
from fsteer_lens.run.teacher_forcing import Answered, answer_divergences, answered, divergences, each_answer

KL = "−KL(steered ‖ unsteered) (nats per token)"
FLUENT = f"no repeated {NGRAM}-gram"


@dataclass(frozen=True, eq=False, repr=False)
class GeneralKL(Suite):
    """How little steering changes answers to general prompts: −KL(steered ‖ unsteered), its mean over answer tokens.

    The divergence is that of the next-token distributions at every token of an answer that is given, so all methods
    are measured on the same tokens. A `Prompting` of `evaluate` is compared with the bare model on the same prompt
    without its words.

    Attributes:
        prompts: prompts to be left alone.
        answers: text or token ids of the answer to each.
        groups: the domain of each.
    """

    prompts: tuple[str, ...]
    answers: tuple[str | tuple[int, ...], ...]
    groups: tuple[str, ...]
    name = "general prompts"

    def __post_init__(self) -> None:
        prompts = tuple(texts_of(self.prompts, "prompt"))
        given = several("answers", self.answers, "an answer for each prompt")
        answers = tuple(one if isinstance(one, str) else tuple(several("answer", one, "token ids")) for one in given)
        groups = tuple(several("groups", self.groups, "a group for each prompt"))
        sizes = [len(prompts), len(answers), len(groups)]
        if len(set(sizes)) > 1:
            raise DataError(self.name, expected="an answer and a group for every prompt", got=sizes)
        normalised(self, prompts=prompts, answers=answers, groups=groups)

    @classmethod
    def answered_by(
        cls,
        model: SteerableModel,
        prompts: Iterable[str],
        groups: Iterable[str],
        *,
        max_new_tokens: int = 32,
        **options: Unpack[PassOptions],
    ) -> "GeneralKL":
        """The suite whose answers are the model's own, greedy and unsteered, generated once.

        Args:
            model: the bare model; hooks of this package that are on it are taken off for that time.
            prompts: prompts to be left alone.
            groups: the domain of each, such as "GSM8K" and "stories".
            max_new_tokens: length of the answers.
            options: `chat`, `chat_template_kwargs`, `prepend_bos`, `batch_size` (16) and `progress` (True) as in
                `generate`; the same as those of the evaluation, or the answers belong to other prompts.

        Raises:
            DataError: another number of groups than of prompts.
            As `generate`.
        """
        passes = options_of("answered_by", Passes, options)
        asked = texts_of(prompts, "prompt")
        with unsteered(model):
            made = generate(model, asked, max_new_tokens=max_new_tokens, **passes.options)
        return cls(tuple(asked), tuple(one.tokens for one in made), tuple(groups))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """−KL in nats per token, by domain."""
        return (Measure(KL, self.groups, "utility"),)

    def taking(self, rows: Sequence[int]) -> "GeneralKL":
        """The same with these prompts alone."""
        columns = ([column[row] for row in rows] for column in (self.prompts, self.answers, self.groups))
        return GeneralKL(*map(tuple, columns))  # pyright: ignore[reportArgumentType]

    def measure(
        self, model: SteerableModel, steering: HookObject | None, setting: Setting
    ) -> tuple[Float[Tensor, " _"], ...]:
        """Minus the mean divergence over each answer's tokens, 0 for the bare model."""
        return self.measure_each(model, [steering], setting)[0]

    def measure_each(
        self, model: SteerableModel, steerings: Sequence[HookObject | None], setting: Setting
    ) -> list[tuple[Float[Tensor, " _"], ...]]:
        """`measure` of each; the bare model runs once for all, and so do the layers below the steered ones."""
        passes, size = setting.passes, setting.batch_size
        bare = answered(model, Setting(None, passes).ids(model, self.prompts), self.answers, passes)
        if setting.context is not None:
            told = answered(model, setting.ids(model, self.prompts), self.answers, passes)
            found = [_from_bare(model, told, bare, steering, size) for steering in steerings]
        else:
            acting = [steering for steering in steerings if steering is not None]
            diverging = iter(answer_divergences(model, bare, acting, batch_size=size) if acting else ())
            same = [torch.zeros(1, dtype=torch.float32, device="cpu")] * len(bare)
            found = [same if steering is None else next(diverging) for steering in steerings]
        return [(-torch.stack([one.mean() for one in rows]),) for rows in found]


def _from_bare(
    model: SteerableModel,
    told: Sequence[Answered],
    bare: Sequence[Answered],
    steering: HookObject | None,
    size: int,
) -> list[Float[Tensor, " tokens"]]:
    """KL of the next-token distributions behind other prompts from the bare model's, at tokens of the same answers."""
    found: list[Any] = []
    for start in range(0, len(bare), size):
        said = dict(each_answer(model, told[start : start + size], steering, batch_size=size))
        base = dict(each_answer(model, bare[start : start + size], None, batch_size=size))
        found += [divergences(said[row], base[row]) for row in range(len(base))]
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Repetition(Suite):
    """Answers that do not repeat themselves: 0 where some four tokens in a row stand in an answer three times.

    Attributes:
        prompts: prompts, as a rule those that are to be steered.
        groups: kind of each; None is one kind.
        max_new_tokens: length of the answers; longer ones have more room to repeat themselves.
    """

    prompts: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    max_new_tokens: int = 40
    name = "repetition"

    def __post_init__(self) -> None:
        prompts = tuple(texts_of(self.prompts, "prompt"))
        told = "a group for each prompt"
        groups = ("all",) * len(prompts) if self.groups is None else tuple(several("groups", self.groups, told))
        if len(groups) != len(prompts):
            raise DataError(self.name, expected=told, got=[len(prompts), len(groups)])
        tokens = whole("max_new_tokens", self.max_new_tokens, 1)
        normalised(self, prompts=prompts, groups=groups, max_new_tokens=tokens)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Answers without a repeated n-gram."""
        assert self.groups is not None
        return (Measure(FLUENT, self.groups, "utility"),)

    def taking(self, rows: Sequence[int]) -> "Repetition":
        """The same with these prompts alone."""
        assert self.groups is not None
        prompts, groups = (tuple(column[row] for row in rows) for column in (self.prompts, self.groups))
        return replace(self, prompts=prompts, groups=groups)

    def measure(
        self, model: SteerableModel, steering: HookObject | None, setting: Setting
    ) -> tuple[Float[Tensor, " _"], ...]:
        """1 for an answer that does not repeat itself, else 0."""
        made = generate(
            model,
            setting.ids(model, self.prompts),
            steering,
            max_new_tokens=self.max_new_tokens,
            batch_size=setting.batch_size,
            progress=False,
        )
        said = [float(not repeats(answer.tokens)) for answer in made]
        return (torch.tensor(said, dtype=torch.float32, device="cpu"),)
