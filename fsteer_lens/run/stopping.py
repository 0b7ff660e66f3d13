"""What ends an answer: the ends of the model, and those that are asked for beside them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import is_whole, several
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.devices import device_of
from fsteer_lens.prompts.tokens import stop_ids, token_texts


class Stop:
    """Which tokens, or which texts, end a row: the model's own ends, and those in `stop`.

    A model that has said its end of sequence has finished; what it would say after that is no answer any more.
    """

    def __init__(self, model: SteerableModel, stop: Sequence[int | str] | None) -> None:
        given = [] if stop is None else several("stop", stop, "a list of token ids and non-empty texts")
        self.texts = tuple(item for item in given if isinstance(item, str))
        ids = [int(item) for item in given if is_whole(item)]
        if "" in self.texts or len(ids) + len(self.texts) < len(given):
            raise InputError("stop", expected="a list of token ids and non-empty texts", got=repr(stop))
        beyond = [token for token in ids if not 0 <= token < model.cfg.d_vocab]
        if beyond:
            expected = f"ids that the model can say, 0..{model.cfg.d_vocab - 1}"
            raise InputError("stop without effect", expected=expected, got=beyond)
        self.ids = torch.tensor(sorted({*ids, *stop_ids(model)}), dtype=torch.long, device=device_of(model))
        self._model = model

    def by_ids(self, chosen: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which rows end with the tokens just chosen."""
        return torch.isin(chosen, self.ids)

    def by_texts(self, generated: Sequence[Sequence[int]]) -> list[bool]:
        """Which rows hold a stop text."""
        if not self.texts:
            return [False] * len(generated)
        texts = ["".join(token_texts(self._model, row)) for row in generated]
        return [any(stop in text for stop in self.texts) for text in texts]

    def cut(self, text: str) -> str:
        """The text up to the first stop text."""
        return text[: min([text.find(stop) for stop in self.texts if stop in text], default=len(text))]
