"""Prints the figures of docs/hooks.md: what reading the live stream costs where several layers are steered.

.venv/bin/python tools/clean_or_live.py
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

import fsteer_lens as fs

STRENGTH = 0.8


def main() -> None:
    """Steer the tutor at two layers at once, on prompts of its valid split that need it."""
    model, data = fs.tutor.load(), fs.tutor.data("safe")
    layers = {layer: fs.tutor.activations(model, layer=layer, progress=False) for layer in (3, 4)}
    both = fs.fit(layers, rank=32, strength=STRENGTH)
    contrasts = data.valid[::3]
    table = Table("query activations", "refused exactly", "gate at layer 4 open", title=f"{both!r}")
    for read in ("clean", "live"):
        made = fs.generate(
            model, [one.prompt for one in contrasts], both, read=read, max_new_tokens=32, batch_size=64, progress=False
        )
        right = [one.text == contrast.preferred for one, contrast in zip(made, contrasts, strict=True)]
        opened = (made.trace.gate[4] >= 0.5).float().mean()
        table.add_row(read, f"{sum(right) / len(right):.2f} of {len(right)}", f"{opened:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
