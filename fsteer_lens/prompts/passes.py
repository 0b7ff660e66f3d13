"""How prompts are put through a model: chat template or not, how many at once, and whether a bar is shown."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypedDict

from fsteer_lens.ground.checks import normalised, switch, whole
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.prompts.tokens import prompt_ids


class PassOptions(TypedDict, total=False):
    """What a function takes by name and hands on as `Passes`."""

    chat: bool
    batch_size: int
    progress: bool


@dataclass(frozen=True)
class Passes:
    """How prompts are put through a model.

    Attributes:
        chat: send string prompts through the chat template; see `prompt_ids`.
        batch_size: rows per forward pass, at most.
        progress: show a progress bar.
    """

    chat: bool = False
    batch_size: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        normalised(
            self,
            chat=switch("chat", self.chat),
            batch_size=whole("batch_size", self.batch_size, 1),
            progress=switch("progress", self.progress),
        )

    @property
    def options(self) -> PassOptions:
        """The same as keyword arguments of a function that takes all three."""
        return {"chat": self.chat, "batch_size": self.batch_size, "progress": self.progress}

    def ids(self, model: SteerableModel, prompts: GivenPrompts) -> list[list[int]]:
        """Token ids of prompts."""
        return [prompt_ids(model, prompt, chat=self.chat) for prompt in prompts_of(prompts, least=0)]

    def bar(self, total: int, description: str) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar, or nothing where none is wanted: a function that is told of finished steps."""
        return progress_bar(total, description, self.progress)
