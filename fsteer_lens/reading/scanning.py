"""Reading prompts for a gate that scans: of each prompt the window that comes nearest to opening it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.gates import Gate
from fsteer_lens.method.scan_gates import ScanGate, nearest
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import DEFAULT_SITE
from fsteer_lens.prompts.forms import Prompt
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.windows import Asked
from fsteer_lens.reading.reader import Advance, Reader


def scan_prompts(
    model: SteerableModel,
    gate: Gate,
    prompts: Sequence[Prompt],
    passes: Passes,
    layer: int,
    advance: Advance = lambda rows: None,
) -> Float[Tensor, "n d"]:
    """`scanned` for prompts that are put through a model in one way."""
    tokenisation = passes.tokenisation(model)
    asked = [Asked(prompt, tokenisation) for prompt in prompts]
    return scanned(model, gate, asked, layer, batch_size=passes.batch_size, advance=advance)


def scanned(
    model: SteerableModel,
    gate: Gate,
    asked: Sequence[Asked],
    layer: int,
    *,
    site: str = DEFAULT_SITE,
    batch_size: int = 16,
    advance: Advance = lambda rows: None,
) -> Float[Tensor, "n d"]:
    """The activation of each prompt's window that comes nearest to opening a gate, on the CPU.

    Every window is run through the unsteered model up to the layer; what all rows begin with is run once, a system
    message as a rule, and nothing else is shared.

    Args:
        model: whose stream to read.
        gate: whose score to look at; of another than a `ScanGate` prompts of plain text are all what a person says.
        asked: the prompts.
        layer: where.
        site: hook point within a layer.
        batch_size: windows per forward pass.
        advance: is told how many prompts are done, all of them at the end.

    Raises:
        InputError: a prompt whose windows nobody can tell.
        SiteError: the model has no such layer.
    """
    before, after = (gate.before, gate.after) if isinstance(gate, ScanGate) else ("", "")
    by_prompt = [one.windows(before, after) for one in asked]
    rows = [row for windows in by_prompt for row in windows]
    tails = [tail for one, windows in zip(asked, by_prompt, strict=True) for tail in one.tokenisation.tails(windows)]
    found = Reader(model, layer, site, batch_size=batch_size).prompts(rows, tails, (gate.read,))[gate.read][layer]
    sizes = torch.tensor([len(windows) for windows in by_prompt], dtype=torch.long, device="cpu")
    advance(len(asked))
    return nearest(gate, found, torch.arange(len(asked), device="cpu").repeat_interleave(sizes))
