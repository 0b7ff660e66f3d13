"""How the time of collecting, generating and fitting grows with each of their sizes."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks import fitting, shapes
from benchmarks.measuring import Section, Settings, seconds
from fsteer_lens import collect, fit_experts, generate, models
from fsteer_lens.ground.tables import markdown

EPOCHS = 5


class Grown(NamedTuple):
    """One step at the sizes it is given, and which of them grows to what."""

    what: str
    run: Callable[..., object]
    sizes: tuple[int, ...]
    place: int
    larger: int

    @property
    def larger_sizes(self) -> tuple[int, ...]:
        """The sizes, one of them larger."""
        return (*self.sizes[: self.place], self.larger, *self.sizes[self.place + 1 :])


def run(settings: Settings) -> Section:
    """Two sizes of each, and the exponent of the power law through both times."""
    cells = []
    for grown in steps(settings):
        smaller = grown.sizes[grown.place]
        small, large = (fastest(partial(grown.run, *sizes)) for sizes in (grown.sizes, grown.larger_sizes))
        exponent = math.log(large / small, grown.larger / smaller)
        cells.append([grown.what, f"{smaller} → {grown.larger}", f"{small:.3g} → {large:.3g}", f"{exponent:.2f}"])
    text = f"""
One size of a step grows, the others stay; the faster of two runs. The exponent is 1 where twice as much takes twice as
long. Collecting and generating run the shape of GPT-2 small; experts are trained (`preset="paper"`), {EPOCHS} epochs.
""".strip()
    return Section("Growth", text, (), markdown(["step, size", "from → to", "seconds", "exponent"], cells))


def fastest(what: Callable[[], object]) -> float:
    """Seconds of the faster of two runs."""
    return min(seconds(what) for _ in range(2))


def steps(settings: Settings) -> list[Grown]:
    """Each step with each size that it grows by; layers are counted from one."""
    shape, few = ("tiny", 2) if settings.quick else ("gpt2-small", 8)
    n, d_model, wide = (24, 16, 32) if settings.quick else (1000, 768, 4096)
    model = shapes.model(shape, models.available_kinds()[0], settings.device)
    steering = shapes.steering(model.cfg.d_model, 1, settings.device)
    depth = model.cfg.n_layers

    def collecting(count: int, n_layers: int) -> None:
        collect(model, shapes.contrasts(shape, count), layer=n_layers - 1, progress=False)

    def generating(count: int, n_new: int) -> None:
        prompts = [one.prompt for one in shapes.contrasts(shape, count)]
        generate(model, prompts, steering, max_new_tokens=n_new, batch_size=few, progress=False)

    def experts(rows: int, width: int, number: int) -> None:
        h, delta = fitting.example(rows, width, settings.device)
        fit_experts(h, delta, preset="paper", n_experts=number, epochs=EPOCHS)

    return [
        Grown("collect, contrasts", collecting, (few, depth), 0, 4 * few),
        Grown("collect, layers", collecting, (few, 1), 1, depth),
        Grown("generate, prompts", generating, (few, few), 0, 4 * few),
        Grown("generate, new tokens", generating, (few, few), 1, 4 * few),
        Grown("fit_experts, n", experts, (n, d_model, 4), 0, 16 * n),
        Grown("fit_experts, d", experts, (n, d_model, 4), 1, wide),
        Grown("fit_experts, K", experts, (n, d_model, 2), 2, 8),
    ]
