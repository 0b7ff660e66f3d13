"""Memory of `generate` with a comparison at a vocabulary of 256,000 tokens."""

from collections.abc import Callable

from benchmarks import shapes
from benchmarks.measuring import Aim, Ratio, Row, Section, Settings, peak_memory
from fsteer_lens import generate, models


def run(settings: Settings) -> Section:
    """Peak of the compared, traced run above plain generation, over what two full rectangles would take."""
    shape, rows, n_new = ("tiny", 2, 4) if settings.quick else ("wide-vocabulary", 4, 96)
    plain, compared = (peak_memory(generating_in_child, shape, rows, n_new, with_all) for with_all in (False, True))
    rectangles = 2 * rows * n_new * shapes.SHAPES[shape]["vocab_size"] * 4 / 2**20
    ratio = Ratio(((compared - plain) / rectangles,), rectangles, compared - plain, unit="MiB")
    text = f"""
{rows} prompts, {n_new} new tokens, {shape} shape with random weights, all rows at once. `generate(compare=True)` feeds
the steered text to the unsteered model in chunks of steps; holding [batch, tokens, vocabulary] in float32 for both
models would take {rectangles:.0f} MiB. Peaks are measured above the loaded model, each in a process of its own.
""".strip()
    row = Row("compare and trace", "peak above plain generation / both rectangles", ratio, Aim(0.5))
    return Section("A large vocabulary", text, (row,))


def generating_in_child(shape: str, rows: int, n_new: int, with_all: bool) -> Callable[[], object]:
    """Make a model, and give the call that generates with steering, trace and comparison, or with nothing."""
    model = shapes.model(shape, models.available_kinds()[-1])  # the one with weights of its own
    prompts = [[1 + row, 2, 3, 4] for row in range(rows)]
    steering = shapes.steering(model.cfg.d_model, 1) if with_all else None
    options = {"progress": False, "batch_size": 2 * rows}
    generate(model, prompts, steering, compare=with_all, max_new_tokens=1, **options)

    def generated() -> object:
        made = generate(model, prompts, steering, compare=with_all, max_new_tokens=n_new, **options)
        assert max(len(one.tokens) for one in made) == n_new, "a model that ends earlier is no measure"
        return made

    return generated
