"""What a steering remembers of how its prompts became tokens."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fsteer_lens.errors import MismatchError
from fsteer_lens.ground.checks import instance, normalised, optional, switch
from fsteer_lens.models.conversion import prepends_bos
from fsteer_lens.prompts.forms import Prompt
from fsteer_lens.prompts.tokens import Tokenisation, require_tokenizer

FORGET = "replace(steering, prompt_format=None)"


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts that something was fitted on became tokens; None is unknown, and fits anything.

    Attributes:
        chat: whether they went through the chat template.
        template: SHA-256 of the chat template's source.
        arguments: further arguments of the template, as JSON.
        prepend_bos: whether a plain text got a beginning-of-sequence token in front.
    """

    chat: bool | None = None
    template: str | None = None
    arguments: str | None = None
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        normalised(
            self,
            chat=optional(switch, "prompt format chat", self.chat),
            template=optional(instance, "prompt format template", self.template, str, "a text or None"),
            arguments=optional(instance, "prompt format arguments", self.arguments, str, "a text or None"),
            prepend_bos=optional(switch, "prompt format prepend_bos", self.prepend_bos),
        )

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any] | None:
        """Further arguments of the template."""
        return None if self.arguments is None else json.loads(self.arguments)

    def require_match(self, other: "PromptFormat") -> None:
        """Raise `MismatchError` naming every difference to how prompts are to be read here; unknown ones match."""
        differences = [
            f"{item.name}: {_told(ours)} when it was fitted, {_told(theirs)} here"
            for item in fields(self)
            if None not in (ours := getattr(self, item.name), theirs := getattr(other, item.name)) and ours != theirs
        ]
        if differences:
            raise MismatchError(
                "this was fitted on prompts that became tokens in another way",
                got="; ".join(differences),
                fix="Leave chat=, chat_template_kwargs= and prepend_bos= out, and they are as they were; or fit again;"
                f" or, if you mean it, {FORGET}.",
            )


def _told(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def format_of(tokenisation: Tokenisation, prompts: Iterable[Prompt]) -> PromptFormat:
    """How these prompts become tokens, as far as they tell, and all do it in one way."""
    kinds = {tokenisation.is_chat(prompt) for prompt in prompts} - {None}
    if kinds == {True}:
        return PromptFormat(True, tokenisation.template.digest, tokenisation.arguments)
    if kinds == {False}:
        asked = tokenisation.prepend_bos
        own = prepends_bos(require_tokenizer(tokenisation.model)) if asked is None else asked
        return PromptFormat(False, prepend_bos=own)
    return PromptFormat()


def merge_formats(formats: Iterable[PromptFormat | None]) -> PromptFormat:
    """What several remember together; raises `MismatchError` where they contradict each other."""
    merged = PromptFormat()
    for one in formats:
        if one is not None:
            merged.require_match(one)
            known = {item.name: getattr(merged, item.name) for item in fields(merged)}
            merged = PromptFormat(
                **{name: getattr(one, name) if value is None else value for name, value in known.items()}
            )
    return merged
