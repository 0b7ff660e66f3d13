"""The likeliest tokens of one step of a generation."""

from typing import Literal, NamedTuple

from fsteer_lens.trace.steps import Steps


class Likely(NamedTuple):
    """One token with its log-probability in nats."""

    token: int
    text: str
    logprob: float


def likeliest(steps: Steps, side: Literal["top", "baseline_top"], step: int) -> list[Likely]:
    """The likeliest tokens of one side, of the first row; a token whose text is not known is called by its id."""
    ids, logprobs, texts = (getattr(steps, f"{side}_{what}") for what in ("ids", "logprobs", "texts"))
    if ids is None or logprobs is None:
        return []
    tokens, values = ids[0, step].tolist(), logprobs[0, step].tolist()
    named = [f"id {token}" for token in tokens] if texts is None else texts[0][step]
    return [Likely(*one) for one in zip(tokens, named, values, strict=True) if one[0] >= 0]
