"""What ends an answer."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.tokens import stop_ids, token_texts


class Stop:
    """Which tokens, or which texts, end a row."""

    def __init__(self, model: SteerableModel, stop: Sequence[int | str] | None) -> None:
        if stop is not None:
            listed = isinstance(stop, Sequence) and not isinstance(stop, str)
            if not listed or any(
                isinstance(item, bool) or not isinstance(item, int | str) or item == "" for item in stop
            ):
                raise InputError("stop", expected="a list of token ids and non-empty texts", got=repr(stop))
        given = stop_ids(model) if stop is None else frozenset(item for item in stop if isinstance(item, int))
        self.ids = torch.tensor(sorted(given), dtype=torch.long, device=model.cfg.device)
        self.texts = () if stop is None else tuple(item for item in stop if isinstance(item, str))
        self._model = model

    def rows(self, chosen: Int[Tensor, " b"], generated: Sequence[Sequence[int]]) -> Bool[Tensor, " b"]:
        """Which rows end with the tokens just chosen."""
        ended = torch.isin(chosen, self.ids)
        if self.texts:
            texts = ["".join(token_texts(self._model, row)) for row in generated]
            hits = [any(stop in text for stop in self.texts) for text in texts]
            ended |= torch.tensor(hits, device=ended.device)
        return ended

    def cut(self, text: str) -> str:
        """The text up to the first stop text."""
        return text[: min([text.find(stop) for stop in self.texts if stop in text], default=len(text))]
