"""One vector added at one layer by other toolkits and by this one: what each adds to a forward pass and to a token.

Needs the environment of the peers: `.venv-peers/bin/python -m benchmarks.peers`, with `--json` for the rows alone.

1. Every toolkit has the same weights, GPT-2 small's shape at random, and adds the same vector after the same block to
   every token.
2. Each is divided by its own model without steering, in the same pairs: steering-vectors and repeng by the Hugging Face
   model that they wrap, ours by the TransformerLens model that it hooks. The same cost is a smaller share of a slower
   model, so what is added, in milliseconds, stands beside every ratio.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import elsewhere
from benchmarks.measuring import Row, Section, Settings, compare

LAYER = 6
STRENGTH = 4.0
NEW_TOKENS = 16


def repeng() -> Any:
    """The package repeng, whose annotations name `np.float_`: NumPy 2 dropped it, and repeng runs without it."""
    import numpy as np

    missing = not hasattr(np, "float_")
    if missing:
        np.float_ = np.float64  # type: ignore[attr-defined]
    try:
        import repeng  # type: ignore[import-not-found]
    finally:
        if missing:
            del np.float_  # type: ignore[attr-defined]
    return repeng


def run(settings: Settings) -> Section:
    """Ratios of each toolkit to its own unsteered model, per forward pass and per generated token."""
    from importlib.metadata import version

    import torch

    torch.set_num_threads(1)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4} if settings.quick else {}
    layer = 1 if settings.quick else LAYER
    tokens = torch.randint(0, 50257, (1, 64), generator=torch.Generator().manual_seed(0)).to(settings.device)
    width = sizes.get("n_embd", 768)
    vector = STRENGTH * torch.randn(width, generator=torch.Generator().manual_seed(1)).to(settings.device)
    rounds = settings.rounds_or(15)
    rows = []
    for name, make in TOOLKITS.items():
        plain, steered = make(sizes, settings.device, layer, vector)
        for what, count, task in (("forward pass", 5, _forward), ("token", NEW_TOKENS, _generated)):
            ratio = compare(task(plain, tokens, count), task(steered, tokens, count), rounds=rounds)
            each = 1000 * (ratio.ours - ratio.reference) / count
            note = f"Adds {each:+.2f} ms to {1000 * ratio.reference / count:.1f}."
            rows.append(Row(f"{name}, per {what}", "steered / unsteered, the same class of model", ratio, note=note))
    return Section(
        "Beside other toolkits",
        f"steering-vectors {version('steering-vectors')}, repeng {version('repeng')} and this package add one vector"
        f" after block {layer} to every token of GPT-2 small's shape with random weights, 64 prompt tokens, batch 1,"
        f" {NEW_TOKENS} greedy tokens with a KV cache. Each is divided by the model that it steers, without steering.",
        tuple(rows),
        "Per token, the three run the generation that their users call: Hugging Face's `generate` under"
        " steering-vectors and repeng, and `fsteer_lens.generate` with its trace for this package, steered or not."
        " The classes differ in speed, and the same cost is a smaller share of a slower one: compare the milliseconds.",
    )


# ------------------------------------------------------------------------------------------------------------ toolkits

Way = tuple[Callable[[Any], Any], Callable[[Any, int], Any]]
"""A forward pass on tokens, and a generation of so many tokens after them."""
Toolkit = Callable[[dict[str, int], str, int, Any], tuple[Way, Way]]


def _hf_model(sizes: dict[str, int], device: str) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval().to(device)  # type: ignore[arg-type]


def _hf_way(model: Any, context: Callable[[], Any]) -> Way:
    import torch

    def forward(tokens: Any) -> Any:
        with torch.no_grad(), context():
            return model(tokens).logits

    def generated(tokens: Any, count: int) -> Any:
        with torch.no_grad(), context():
            return model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )

    return forward, generated


@contextmanager
def _bare() -> Iterator[None]:
    yield


def _steering_vectors(sizes: dict[str, int], device: str, layer: int, vector: Any) -> tuple[Way, Way]:
    from steering_vectors import SteeringVector  # type: ignore[import-not-found]

    model = _hf_model(sizes, device)
    return _hf_way(model, _bare), _hf_way(model, lambda: SteeringVector({layer: vector}).apply(model))


def _repeng(sizes: dict[str, int], device: str, layer: int, vector: Any) -> tuple[Way, Way]:
    package = repeng()
    wrapped = package.ControlModel(_hf_model(sizes, device), [layer])
    wrapped.set_control(package.ControlVector("gpt2", {layer: vector.cpu().numpy()}))
    return _hf_way(_hf_model(sizes, device), _bare), _hf_way(wrapped, _bare)


def _ours(kind: Any) -> Toolkit:
    def make(sizes: dict[str, int], device: str, layer: int, vector: Any) -> tuple[Way, Way]:
        import torch

        from fsteer_lens import generate, models
        from fsteer_lens.steering import MeanShift
        from fsteer_lens.tutor.loading import FOLDER

        from transformers import AutoTokenizer  # isort: skip

        # any tokenizer serves: prompts are ids; texts of ids that it does not know are empty
        model = models.from_hf(_hf_model(sizes, device), AutoTokenizer.from_pretrained(FOLDER), kind=kind)
        shift = MeanShift(vector, layer=layer, scope="all")

        def way(steering: Any) -> Way:
            def forward(tokens: Any) -> Any:
                with torch.no_grad(), _bare() if steering is None else steering.on(model):
                    return model(tokens, return_type="logits")

            def generated(tokens: Any, count: int) -> Any:
                made = generate(model, tokens[0].tolist(), steering, max_new_tokens=count, progress=False)
                assert len(made[0].tokens) == count, "a model that ends earlier is no measure"
                return made

            return forward, generated

        return way(None), way(shift)

    return make


TOOLKITS: dict[str, Toolkit] = {
    "steering-vectors": _steering_vectors,
    "repeng": _repeng,
    "fsteer_lens on TransformerBridge": _ours("bridge"),
    "fsteer_lens on HookedTransformer": _ours("hooked"),
}


def _forward(way: Way, tokens: Any, count: int) -> Callable[[], Any]:
    return lambda: [way[0](tokens) for _ in range(count)]


def _generated(way: Way, tokens: Any, count: int) -> Callable[[], Any]:
    return lambda: way[1](tokens, count)


if __name__ == "__main__":
    elsewhere.main(run, __doc__)
