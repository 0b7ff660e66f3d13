"""How prompts are put through a model: how they become tokens, how many at once, and whether a bar is shown."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeVar

from fsteer_lens.ground.checks import normalised, optional, switch, whole
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.chat import canonical_arguments
from fsteer_lens.prompts.formats import PromptFormat, format_of
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompts_of
from fsteer_lens.prompts.tokens import Tokenisation

Own = TypeVar("Own", bound="Passes")


class FormatOptions(TypedDict, total=False):
    """How prompts become tokens: what a function takes by name and hands on as `Passes`, of a single prompt."""

    chat: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    prepend_bos: bool | None


class BatchOptions(FormatOptions, total=False):
    """What a function takes by name and hands on as `Passes`, where it shows no progress."""

    batch_size: int


class PassOptions(BatchOptions, total=False):
    """What a function takes by name and hands on as `Passes`."""

    progress: bool


@dataclass(frozen=True)
class Passes:
    """How prompts are put through a model.

    Attributes:
        chat: send string prompts through the chat template; None: as a steering was fitted, else not.
        batch_size: rows per forward pass, at most.
        progress: show a progress bar.
        chat_template_kwargs: further arguments of the chat template; None: as a steering was fitted, else none.
        prepend_bos: put a beginning-of-sequence token in front of plain strings; None: as a steering was fitted, else
            as the tokenizer does.
    """

    chat: bool | None = None
    batch_size: int = 16
    progress: bool = True
    chat_template_kwargs: Mapping[str, Any] | None = None
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        normalised(
            self,
            chat=optional(switch, "chat", self.chat),
            batch_size=whole("batch_size", self.batch_size, 1),
            progress=switch("progress", self.progress),
            prepend_bos=optional(switch, "prepend_bos", self.prepend_bos),
        )
        canonical_arguments(self.chat_template_kwargs)

    @property
    def formatting(self) -> FormatOptions:
        """How prompts become tokens, as keyword arguments."""
        return {
            "chat": self.chat,
            "chat_template_kwargs": self.chat_template_kwargs,
            "prepend_bos": self.prepend_bos,
        }

    @property
    def batching(self) -> BatchOptions:
        """The same as keyword arguments of a function that shows no progress."""
        return {**self.formatting, "batch_size": self.batch_size}

    @property
    def options(self) -> PassOptions:
        """The same as keyword arguments of a function that takes all of them."""
        return {**self.batching, "progress": self.progress}

    def tokenisation(self, model: SteerableModel) -> Tokenisation:
        """How prompts become token ids."""
        return Tokenisation(model, bool(self.chat), canonical_arguments(self.chat_template_kwargs), self.prepend_bos)

    def ids(self, model: SteerableModel, prompts: GivenPrompts) -> list[list[int]]:
        """Token ids of prompts."""
        tokenisation = self.tokenisation(model)
        return [tokenisation.ids(prompt) for prompt in prompts_of(prompts, least=0)]

    def following(self: Own, remembered: PromptFormat, model: SteerableModel, prompts: Sequence[Prompt] = ()) -> Own:
        """The same, with what a steering remembers wherever nothing was asked for.

        Raises:
            MismatchError: something was asked for, or given with the prompts, that contradicts it.
        """
        if remembered == PromptFormat():
            return self
        names = ("chat", "chat_template_kwargs", "prepend_bos")
        given = {name: getattr(remembered if getattr(self, name) is None else self, name) for name in names}
        resolved = replace(self, **given)
        asked = self.chat_template_kwargs
        arguments = None if asked is None else canonical_arguments(asked)
        asked = PromptFormat(self.chat, arguments=arguments, prepend_bos=self.prepend_bos)
        remembered.require_match(format_of(resolved.tokenisation(model), prompts) if prompts else asked)
        return resolved

    def bar(self, total: int, description: str) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar, or nothing where none is wanted: a function that is told of finished steps."""
        return progress_bar(total, description, self.progress)
