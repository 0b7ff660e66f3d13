"""Is a converted model still the model that it was made from? Both are asked, and must say the same.

A conversion can lose an adapter, a window, a scale of the logits or the KV cache, and still give fluent text. So the
Hugging Face model's log-probabilities after a few tokens are written down before it is converted, and compared with
what the converted model says: in a single row and in a left-padded pair, with and without a KV cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError, NonFiniteError
from fsteer_lens.ground.foreign import told
from fsteer_lens.models.attaching import hooks_added
from fsteer_lens.models.classes import CLASS_NAMES, SteerableModel, kind_of
from fsteer_lens.models.devices import device_of, device_of_weights
from fsteer_lens.models.forward import Forward
from fsteer_lens.models.points import site_name

LENGTH = 6  # tokens: each pass reads all weights once, however few there are
SHALLOW = 8  # of more layers than these, the first of every kind are run with a cache and padding, not all
ALLOWED = {torch.bfloat16: 0.1, torch.float16: 0.03}
"""RMS difference of log-probabilities, relative to their spread over the vocabulary; 0.001 in float32.

Measured on right conversions: up to 0.04 in bfloat16 and 0.016 in float16 (30 layers), 1e-5 in float32.
"""
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class View(NamedTuple):
    """A way of running the probe."""

    padded: bool
    cache: bool

    def __str__(self) -> str:
        return ("a left-padded pair" if self.padded else "a single row") + (" with a KV cache" if self.cache else "")


ALONE = View(padded=False, cache=False)
OTHERS = (View(False, True), View(True, False), View(True, True))


@dataclass(frozen=True, eq=False)
class Probe:
    """A few tokens, and what the Hugging Face model says after each: alone in their row, without a KV cache.

    The first half of the tokens is the pair's shorter row: what follows does not change what is said of it.

    Attributes:
        tokens: ids, [s].
        logprobs: log-probabilities of the next token, [s vocab], on the CPU.
        depth: number of layers that hold one of every kind of layer; all layers of a model of few.
        name: the model's class.
    """

    tokens: Int[Tensor, " s"]
    logprobs: Float[Tensor, "s vocab"]
    depth: int
    name: str


@torch.no_grad()
def probe(network: Any) -> Probe:
    """Ask a Hugging Face model, adapters in its layers included.

    Raises:
        InputError: it does not run.
        NonFiniteError: it says NaN.
    """
    config = network.config.get_text_config(decoder=True)
    length = min(LENGTH, context_of(config) or LENGTH)
    steps = torch.arange(1, length + 1, dtype=torch.float64, device="cpu")
    tokens = ((steps * 0.618 * config.vocab_size) % config.vocab_size).long()
    try:
        out = network(input_ids=tokens.unsqueeze(0).to(device_of_weights(network)), use_cache=False)
    except Exception as error:
        raise InputError(
            f"{type(network).__name__} does not run, before any conversion",
            expected="a model that reads input_ids alone",
            got=told(error),
        ) from error
    logprobs = out.logits[0].float().log_softmax(dim=-1).cpu()
    if logprobs.isnan().any():
        raise NonFiniteError(
            f"{type(network).__name__}'s own log-probabilities",
            expected="numbers",
            got=f"NaN in {network.dtype}, before any conversion",
            fix="Load it with dtype=torch.float32 or bfloat16; where that does not help, its weights are damaged.",
        )
    return Probe(tokens, logprobs, _depth(config), type(network).__name__)


def context_of(config: Any) -> int | None:
    """The longest text that a configuration allows, where it says so."""
    return next((value for name in CONTEXTS if (value := getattr(config, name, None))), None)


def _depth(config: Any) -> int:
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ["the only one"]
    first_of_each = max(list(kinds).index(kind) for kind in kinds) + 1
    shares = getattr(config, "num_kv_shared_layers", 0)  # the last layers read the keys of earlier ones
    return layers if layers <= SHALLOW or shares else min(layers, max(3, first_of_each))


@torch.no_grad()
def require_agreement(model: SteerableModel, asked: Probe) -> None:
    """Raise `InputError` where a converted model says another thing than the model that it was made from."""
    fits = model.cfg.n_ctx
    asked = replace(asked, tokens=asked.tokens[:fits], logprobs=asked.logprobs[:fits])
    allowed = ALLOWED.get(model.cfg.dtype, 0.001 if torch.get_float32_matmul_precision() == "highest" else 0.03)
    try:
        apart = dict(_compare(model, asked, allowed))
    except Exception as error:
        raise _refusal(model, asked, "does not run", told(error)) from error
    worse = {view: nats for view, (relative, nats) in apart.items() if not relative <= allowed}
    if worse:
        differ = ", ".join(f"{nats:.2g} nats in {view}" for view, nats in worse.items())
        same = "; none in " + ", ".join(str(view) for view in apart if view not in worse) if len(worse) < 4 else ""
        raise _refusal(model, asked, "says other things", f"differences of up to {differ}{same}")


def _compare(model: SteerableModel, asked: Probe, allowed: float) -> Iterator[tuple[View, tuple[float, float]]]:
    """How far the log-probabilities are off, relative and in nats, in each way of running.

    In a model of many layers the other ways are first compared with the single row at the stream after `depth`
    layers: whether a cache or padding is handled rightly is a matter of the kind of layer, and whole passes would cost
    a tenth of loading. Only where the streams differ, all are run to the end.
    """
    stream, logits = _run(model, asked, ALONE)
    alone = _apart(logits, asked.logprobs)
    yield ALONE, alone
    shallow = asked.depth < model.cfg.n_layers and alone[0] <= allowed
    if shallow and all(_strayed(_run(model, asked, view, asked.depth)[0], stream) < allowed / 4 for view in OTHERS):
        return
    for view in OTHERS:
        yield view, _apart(_run(model, asked, view)[1], asked.logprobs)


def _run(
    model: SteerableModel, asked: Probe, view: View, layers: int | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n vocab"]]:
    """The stream after the first layers and the logits, at the real tokens; logits of no use where `layers` are run."""
    tokens = asked.tokens.unsqueeze(0)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if view.padded:
        pads = len(asked.tokens) - max(1, len(asked.tokens) // 2)
        tokens, mask = tokens.repeat(2, 1), mask.repeat(2, 1)
        tokens[1], mask[1, :pads] = tokens[1].roll(pads), False
    length = tokens.shape[1]
    steps = min(2, length - 1) if view.cache else 0
    parts = [length - steps] + [1] * steps  # the prompt, then token by token, the way that `generate` decodes
    tokens, mask = (rows.to(device_of(model)) for rows in (tokens, mask))
    forward = Forward(model, cache=view.cache, layers=layers)
    seen: list[Tensor] = []
    hooks = [(site_name(model, asked.depth - 1), lambda x, hook: seen.append(x.float().cpu()))]
    said = []
    for part in zip(tokens.split(parts, 1), mask.split(parts, 1), strict=True):
        with hooks_added(model, hooks):
            said.append(forward(*part))
    stream = torch.cat(seen, dim=1)[mask.cpu()]
    return stream, torch.cat(said, dim=1)[mask].float().cpu() if layers is None else stream


def _apart(logits: Float[Tensor, "n vocab"], alone: Float[Tensor, "s truth"]) -> tuple[float, float]:
    """The worst token's RMS difference over the spread of its log-probabilities, and the largest difference in nats."""
    if logits.shape[-1] != alone.shape[-1]:
        raise ValueError(f"logits for {logits.shape[-1]} tokens, where the model has {alone.shape[-1]}")
    truth, said = _rows(alone, len(logits)), logits.log_softmax(dim=-1)
    difference = torch.where(said == truth, 0, said - truth).abs()  # both are minus infinity where a token is ruled out
    spread = torch.stack([row[row.isfinite()].std(correction=0) for row in truth])
    off = difference.square().mean(dim=-1).sqrt() / spread.clamp(min=1e-3)
    return float(off.max()), float(difference.max())


def _strayed(stream: Float[Tensor, "n d"], alone: Float[Tensor, "s d"]) -> float:
    """The worst token's distance between streams, relative to the stream of the single row."""
    truth = _rows(alone, len(stream))
    return float(((stream - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-12)).max())


def _rows(alone: Float[Tensor, "s v"], n: int) -> Float[Tensor, "n v"]:
    """What `n` real tokens of a view must have: those of the single row, and, in a pair, its first ones again."""
    return torch.cat([alone, alone[: n - len(alone)]])


def _refusal(model: SteerableModel, asked: Probe, what: str, got: str) -> InputError:
    from importlib.metadata import version

    kind = kind_of(model)
    other = 'use kind="bridge", or ' if kind == "hooked" else ""
    installed = version("transformer-lens")
    return InputError(
        f"{CLASS_NAMES[kind]} made of {asked.name} {what}",
        expected="the Hugging Face model's own next-token log-probabilities",
        got=got,
        fix="If the model has forward hooks or quantised weights, load it without; if not, "
        f"{other}try another TransformerLens than {installed}.",
    )
