"""Opening a session for prompts that are known beforehand, so that nothing about them has to be guessed."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import HookError, InputError
from fsteer_lens.ground.checks import choice, instance, optional
from fsteer_lens.hooks.objects import HookObject, Link, remembered
from fsteer_lens.hooks.session import Session
from fsteer_lens.method.gates import READINGS, Reading
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.chat import NO_ARGUMENTS
from fsteer_lens.prompts.tokens import Batch, Tokenisation
from fsteer_lens.prompts.windows import Asked
from fsteer_lens.reading import reader
from fsteer_lens.reading.readings import of_prompt
from fsteer_lens.reading.scanning import scanned

Read = Literal["clean", "live"]
SCANNED_AT_ONCE = 16
"""Windows of prompts per forward pass."""
EXPECTED = "a steering, probe, ablation or chain"


def open_session(
    model: SteerableModel,
    batch: Batch,
    hook_object: HookObject,
    prompt_lengths: Int[Tensor, " b"],
    read: Read | None = None,
    asked: Sequence[Asked] | None = None,
) -> Session:
    """A session for padded rows that begin with their prompts.

    Args:
        model: what to run.
        batch: prompts, with or without more tokens after them.
        hook_object: what to put on the model.
        prompt_lengths: real prompt tokens of each row, [b].
        read: "clean" takes every query activation from one pass of the unsteered model; "live" from the running
            stream, in which later layers see what earlier ones have added. Gates and experts are fitted on an unsteered
            stream. The two differ only where there are several points. None: "clean", or "live" where something
            decides again at every step, which no pass over the prompt can answer.
        asked: the prompts of the rows as they were given, for gates that scan them; None where nobody knows them.

    Raises:
        InputError: no hook object, or read="clean" for several points where something decides again at every step, or
            a gate scans and a prompt does not tell what a person said in it.
        HookError: a gate scans, and nobody knows the prompts.
        MismatchError, SiteError: the hook object does not fit the model.
    """
    instance("steering", hook_object, HookObject, EXPECTED)
    optional(choice, "read", read, ("clean", "live"))
    reads: list[Reading] = [read for read in READINGS if any(read in link.reads for link in hook_object.links)]
    tails = _tails(model, batch, hook_object, prompt_lengths) if "turn_end" in reads else None
    session = hook_object.session_on(model, prompt_lengths, batch.mask, tails)
    for state, link in zip(session.states, hook_object.links, strict=True):
        if link.scanning:
            state.scanned = _scanned(model, link, asked, len(batch.tokens))
    stepwise = [link for link in hook_object.links if link.stepwise]
    if len(hook_object.points) == 1 or read == "live" or (read is None and stepwise):
        return session
    if stepwise:
        raise InputError(
            'read="clean" at several layers',
            expected="links that decide once, at the prompt's last token",
            got=f"{stepwise[0]!r}, which decides at every step",
            fix='Use read="live".',
        )
    prompt = batch.mask & (batch.mask.cumsum(dim=1) <= prompt_lengths.to(batch.mask.device).unsqueeze(1))

    def keep(activation: Float[Tensor, "b s d"]) -> Float[Tensor, "reads b d"]:
        return torch.stack([of_prompt(read, activation, prompt, tails) for read in reads])

    queries = reader.read(model, batch, hook_object.points, keep)
    for state in session.states:
        state.queries = {
            read: {point.layer: queries[point][place] for point in state.link.points}
            for place, read in enumerate(reads)
        }
    return session


def _scanned(model: SteerableModel, link: Link, asked: Sequence[Asked] | None, rows: int) -> dict[int, Tensor]:
    """Of each prompt the window nearest to opening the link's gates that scan, {layer: [b d]}."""
    if asked is None:
        raise HookError(
            f"{link!r} has a gate that scans windows of the prompts",
            expected="prompts as text or messages",
            got="token ids alone",
            fix="Use generate or stream, or the gate without its scan: steering.with_gate(gate.inner).",
        )
    assert len(asked) == rows
    return {
        layer: scanned(model, gate, asked, layer, site=link.site, batch_size=SCANNED_AT_ONCE)
        for layer, gate in link.scanning.items()
    }


def _tails(
    model: SteerableModel, batch: Batch, hook_object: HookObject, prompt_lengths: Int[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """How many tokens of each prompt come after the one that ends the user's turn."""
    told = Tokenisation(model, arguments=remembered(hook_object).arguments or NO_ARGUMENTS)
    rows = [
        row[real][:length].tolist() for row, real, length in zip(batch.tokens, batch.mask, prompt_lengths, strict=True)
    ]
    return torch.tensor(told.tails(rows), dtype=torch.long, device="cpu")
