"""A gate that looks at windows of a prompt: the prompt itself, and pieces of it as prompts of their own.

It takes the window whose score comes nearest to opening it, so that what is put around a request cannot pull it away:
the request is a window too. More windows come near to opening it by chance, so its cut is one of the maximum.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import finite
from fsteer_lens.method.gates import Gate, InnerCutGate, oriented
from fsteer_lens.method.linalg import variant


@final
@dataclass(frozen=True, eq=False, repr=False)
class ScanGate(InnerCutGate):
    """Another gate's score, cut: 1 where it comes to `cut` for one window of the prompt, else 0.

    `evaluation.fit_scan` makes one. Called with activations it says what it makes of each by itself. A steering asks it
    about the window of each prompt that comes nearest to opening it, whose score and readings are in the trace. That
    takes prompts as text or messages: in `generate`, `stream`, and whatever measures steering on prompts. Under `.on`
    and `.attach` nobody knows them, and the steering raises.

    It cannot be a part of another gate, whose parts might open for different windows: combine first, then scan.

    Attributes:
        inner: whose score.
        cut: from where on the gate is open, or below it where the inner gate opens below.
        before: what stands before what a person says in a prompt of plain text; in a chat the template tells.
        after: what stands after it.
    """

    inner: Gate
    cut: float
    before: str = ""
    after: str = ""

    scans = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.before, str) or not isinstance(self.after, str):
            raise InputError("ScanGate", expected="before and after as text", got=(self.before, self.after))

    def __repr__(self) -> str:
        return f"ScanGate({self.inner!r}, cut={self.cut:.4g})"

    def at_threshold(self, threshold: float) -> Gate:
        """The same with another cut."""
        return variant(self, cut=finite("threshold", threshold))


def nearest(gate: Gate, windows: Float[Tensor, "w d"], owners: Int[Tensor, " w"]) -> Float[Tensor, "n d"]:
    """Of each owner's windows the one that comes nearest to opening a gate; the first where several do.

    `owners` are the numbers 0 to n − 1, ascending, one for each window; none without a window. What is not finite comes
    first: it is not to be passed over.
    """
    scores = oriented(gate, windows)
    scores = scores.masked_fill(~(scores.isfinite() & windows.isfinite().all(dim=-1)), torch.inf).cpu()
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(owners.cpu()[order], stable=True)]
    firsts = torch.cat([owners.new_ones(1).bool().cpu(), owners.cpu().diff() > 0])
    return windows[order[firsts].to(windows.device)]
