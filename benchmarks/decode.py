"""What steering costs while a model generates, and what one hook costs in a forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.measuring import Aim, OnGpu, Ratio, Row, Section, Settings, compare, gpu_rows, peak_on_gpu
from fsteer_lens import FineSteer, generate, models
from fsteer_lens.models.attaching import hooks_added


def run(settings: Settings) -> Section:
    """Steered against unsteered, on every model class; then our hook against an empty one."""
    shape = "tiny" if settings.quick else "gpt2-small"
    n_new = 4 if settings.quick else 24
    rows: list[Row] = []
    for kind in models.available_kinds():
        name = models.CLASS_NAMES[kind]
        model = shapes.model(shape, kind, settings.device)
        layer = model.cfg.n_layers // 2
        steering = shapes.steering(model.cfg.d_model, layer, settings.device)
        off, on = (decoding(model, steering, n_new, settings.rounds_or(30), trace=trace) for trace in (False, True))
        rows += [
            Row(f"{name}, trace off", "model.generate under steering.on(model) / without", off, Aim(1.02)),
            Row(f"{name}, trace on", "generate with steering / without", on, Aim(1.05)),
            Row(
                f"{name}, one hook",
                "a forward pass with our hook / with an empty one",
                one_hook(model, steering, settings),
            ),
            Row(
                f"{name}, replay",
                "generate with compare and replay / with compare",
                recording(model, steering, n_new, settings.rounds_or(3)),
                Aim(1.6),
            ),
        ]
    network = shapes.hf_model(shape, settings.device)
    rows.append(
        Row(
            "transformers, as it is",
            "network.generate under steering.on(network) / without",
            on_network(network, n_new, settings.rounds_or(30)),
            Aim(1.03),
        )
    )
    what = "generate with steering / without, TransformerBridge, bfloat16"
    rows += gpu_rows("trace on", what, Aim(1.05), settings, on_gpu)
    text = f"""
Greedy decoding of {n_new} tokens after a prompt of 32, {shape} shape with random weights, one row, with a KV cache; no
token ends the text, so both sides compute equally many. Gate and experts are decided upon once, at the prompt's last
token; after that every token costs one vector addition and the record of its size. That record is always kept: "trace
off" is the model's own `generate` with the hooks on it, which keeps nothing else, and "trace on" the package's
`generate`, whose trace has every row, layer and token. "As it is" is a model of transformers that nothing was made of,
with its own `generate`; its trace is the same. "One hook" puts one hook on one layer and runs 32 tokens
through the model: a new prompt each time, so gate and experts are in it. "Replay" is what recording for
`figures.replay` costs: two more passes over the text, how the unsteered model would have gone on, and above all the
logit lens, which runs the model's head at every layer. It is divided by a run that was compared, which is cheap here: a
text that steering did not change, as these random weights do not let it, is not generated a second time.
""".strip()
    return Section("Decoding", text, tuple(rows))


def decoding(model: Any, steering: FineSteer, n_new: int, rounds: int, *, trace: bool) -> Ratio:
    """Time of generating with steering over that of generating without."""
    prompt = prompt_of(model)
    if trace:
        options: dict[str, Any] = {"max_new_tokens": n_new, "progress": False}
        made = generate(model, prompt, steering, **options)
        assert len(made[0].tokens) == n_new == len(generate(model, prompt, **options)[0].tokens)
        return compare(
            lambda: generate(model, prompt, **options),
            lambda: generate(model, prompt, steering, **options),
            rounds=rounds,
        )
    tokens = torch.tensor([prompt], device=model.cfg.device)

    def steered() -> None:
        with steering.on(model):
            own_generate(model, tokens, n_new)

    return compare(lambda: own_generate(model, tokens, n_new), steered, rounds=rounds)


def own_generate(model: Any, tokens: Tensor, n_new: int) -> list[int]:
    """What the model's own `generate` puts after one row, the most probable token each time, whatever ends a text."""
    found = model.generate(
        tokens, max_new_tokens=n_new, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens"
    )
    assert found.shape[1] == tokens.shape[1] + n_new
    return found[0, tokens.shape[1] :].tolist()


def on_network(network: Any, n_new: int, rounds: int) -> Ratio:
    """Time of a transformers model's own `generate` with steering over that without."""
    layer = network.config.num_hidden_layers // 2
    steering = shapes.steering(network.config.hidden_size, layer, str(network.device))
    tokens = torch.tensor([random_tokens(network.config.vocab_size)], device=network.device)

    def run() -> None:
        found = network.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n_new, min_new_tokens=n_new
        )
        assert found.shape[1] == tokens.shape[1] + n_new

    def steered() -> None:
        with steering.on(network):
            run()

    return compare(run, steered, rounds=rounds)


def one_hook(model: Any, steering: FineSteer, settings: Settings) -> Ratio:
    """Time of a forward pass with our hook over one with a hook that does nothing, at the same point."""
    tokens = torch.tensor([prompt_of(model)], device=model.cfg.device)
    name = f"blocks.{steering.layer}.hook_resid_post"

    def forward(hook: Callable[..., Any]) -> None:
        with torch.no_grad(), hooks_added(model, [(name, hook)]):
            model(tokens)

    def ours() -> None:
        forward(steering.fwd_hooks()[0][1])

    return compare(lambda: forward(lambda activation, hook: None), ours, rounds=settings.rounds_or(40))


def recording(model: Any, steering: FineSteer, n_new: int, rounds: int) -> Ratio:
    """Time of a compared generation that is recorded to be watched over that of one that is not."""
    options: dict[str, Any] = {"max_new_tokens": n_new, "compare": True, "progress": False}
    prompt = prompt_of(model)
    return compare(
        lambda: generate(model, prompt, steering, **options),
        lambda: generate(model, prompt, steering, replay=True, **options),
        rounds=rounds,
    )


def prompt_of(model: Any) -> list[int]:
    """A prompt of random tokens."""
    return random_tokens(model.cfg.d_vocab)


def random_tokens(vocabulary: int, length: int = 32) -> list[int]:
    """Random tokens, without the one that pads."""
    return torch.randint(1, vocabulary, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def on_gpu(shape: str, n_new: int = 64, rounds: int = 5) -> OnGpu:
    """Decode with and without steering on the CUDA device, with the trace on."""
    model = shapes.model(shape, "bridge", "cuda")
    steering = shapes.steering(model.cfg.d_model, model.cfg.n_layers // 2, "cuda")
    prompt = prompt_of(model)
    peak = peak_on_gpu(lambda: generate(model, prompt, steering, max_new_tokens=n_new, progress=False))
    ratio = decoding(model, steering, n_new, rounds, trace=True)
    return OnGpu(ratio, peak, n_new / ratio.ours)
