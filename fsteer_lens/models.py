"""TransformerLens models: loading, hook points, and one way of running both classes.

`HookedTransformer` exists up to TransformerLens 3.9, `TransformerBridge` from 3.9 on. Everything that differs between
them is in this module; the rest of the package sees a `SteerableModel`.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError, MissingDependencyError, SiteError

Kind = Literal["hooked", "bridge"]
CLASS_NAMES: Mapping[Kind, str] = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
SITES = ("hook_resid_pre", "hook_resid_post")
DEFAULT_SITE = "hook_resid_post"


@runtime_checkable
class SteerableModel(Protocol):
    """What HookedTransformer and TransformerBridge have in common and this package uses."""

    cfg: Any
    tokenizer: Any
    hook_dict: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass."""
        ...


# ------------------------------------------------------------------------------------------------- which class, loading


def available_kinds() -> tuple[Kind, ...]:
    """Model classes that the installed TransformerLens has, the preferred one first."""
    classes: dict[Kind, tuple[str, str]] = {
        "hooked": ("transformer_lens", "HookedTransformer"),
        "bridge": ("transformer_lens.model_bridge", "TransformerBridge"),
    }

    def is_there(module: str, name: str) -> bool:
        try:
            return hasattr(import_module(module), name)
        except ImportError:  # TransformerLens 4 raises it for a name that it dropped
            return False

    return tuple(kind for kind, where in classes.items() if is_there(*where))


def kind_of(model: SteerableModel) -> Kind:
    """Whether a model is a HookedTransformer ("hooked") or a TransformerBridge ("bridge")."""
    return "bridge" if hasattr(model, "original_model") else "hooked"


def load(
    name_or_folder: str | Path, kind: Kind | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SteerableModel:
    """Load a Hugging Face model by its hub name or from a local folder, without processing its weights.

    Raises:
        InputError: no such folder, and no such name on the hub (or no hub in reach).
        MissingDependencyError: the installed TransformerLens lacks the class asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_bars() if Path(name_or_folder).is_dir() else nullcontext():
            hf_model = AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {str(name_or_folder)!r}",
            expected="a folder with config.json, weights and tokenizer, or a name on the Hugging Face hub",
            got=str(error).splitlines()[0],
            fix="Check the path; for a name, check the network and `huggingface-cli login` for gated models.",
        ) from error
    return from_hf(hf_model.to(device), tokenizer, kind=kind)  # pyright: ignore[reportArgumentType]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which are for downloads: a folder is read in no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def from_hf(hf_model: Any, tokenizer: Any, kind: Kind | None = None, process: bool = False) -> SteerableModel:
    """Make a TransformerLens model from a Hugging Face model and tokenizer that are already in memory.

    Works offline and keeps the tokenizer as it is given. The given `hf_model` must not be used afterwards: a
    Bridge rewires it in place.

    Args:
        hf_model: a transformers causal language model.
        tokenizer: its tokenizer.
        kind: "hooked" or "bridge"; None takes HookedTransformer where the installed TransformerLens has it.
        process: fold LayerNorm and centre the writing weights, as `HookedTransformer.from_pretrained` does. Gates and
            experts that were fitted without it do not fit a processed LayerNorm model.

    Raises:
        MissingDependencyError: the installed TransformerLens lacks the class.
        InputError: TransformerLens cannot convert this architecture, or it is none that can be steered.
    """
    kinds = available_kinds()
    kind = kind or kinds[0]
    if kind not in ("hooked", "bridge"):
        raise InputError("kind", expected="'hooked' or 'bridge'", got=repr(kind))
    if kind not in kinds:
        raise MissingDependencyError(
            f"this TransformerLens has no model class for kind={kind!r}",
            got=f"kinds {kinds}",
            fix='Use kind="bridge", or pip install "transformer-lens<4" for HookedTransformer.',
        )
    hf_model.eval()
    if not hf_model.config.architectures:  # not set on a model that was made from its configuration
        hf_model.config.architectures = [type(hf_model).__name__]
    convert = _hooked if kind == "hooked" else _bridge
    try:
        model = convert(hf_model, tokenizer, process)
    except (NotImplementedError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"TransformerLens cannot convert {type(hf_model).__name__} to {CLASS_NAMES[kind]}",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix='Use kind="bridge".' if kind == "hooked" else "TransformerLens' documentation lists what it knows.",
        ) from error
    require_decoder(model)
    # Both classes load it anew from its name and lose what was changed in memory, the Bridge's setter as well.
    setattr(model, "tokenizer" if kind == "hooked" else "_tokenizer", tokenizer)
    model.cfg.tokenizer_prepends_bos = _tokenizer_prepends_bos(tokenizer)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _hooked(hf_model: Any, tokenizer: Any, process: bool) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config, get_pretrained_state_dict

    parameter = next(hf_model.parameters())
    with tempfile.TemporaryDirectory(prefix="config") as folder:
        hf_model.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        if "n_positions" in config:  # GPT-2's older name, which TransformerLens asks for
            config.setdefault("n_ctx", config["n_positions"])
        (Path(folder) / "config.json").write_text(json.dumps(config))
        gemma2 = type(hf_model).__name__ == "Gemma2ForCausalLM"
        settings = _gemma2_settings(hf_model.config) if gemma2 else convert_hf_model_config(folder)
        for unused in ("tokenizer_name", "quantization_method", "dtype"):
            settings.pop(unused, None)
        cfg = HookedTransformerConfig(**settings, device=str(parameter.device), dtype=parameter.dtype)
        state = get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=parameter.dtype)
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        state, fold_ln=process, center_writing_weights=process, center_unembed=process, fold_value_biases=process
    )
    return model


def _gemma2_settings(config: Any) -> dict[str, Any]:
    """Settings of a Gemma-2, whose weights TransformerLens converts, and whose sizes it knows by hub name only."""
    return {
        "original_architecture": "Gemma2ForCausalLM",
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_activation,
        "initializer_range": config.initializer_range,
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
        "use_attn_scale": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
    }


def _bridge(hf_model: Any, tokenizer: Any, process: bool) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    name = hf_model.config._name_or_path or type(hf_model).__name__
    parameter = next(hf_model.parameters())
    hf_model.set_attn_implementation("eager")
    model = TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=str(parameter.device), dtype=parameter.dtype
    )
    if process:
        model.enable_compatibility_mode()
    return model


def _tokenizer_prepends_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def require_decoder(model: SteerableModel) -> None:
    """Raise `InputError` unless the model is a decoder that reads left to right by attention alone.

    An encoder's last token knows what comes after it, and a model that carries a running state (Mamba, say) reads
    padding as text: both would be steered without an error, and wrongly.
    """
    original = getattr(model, "original_model", None)
    if original is None:
        causal = getattr(model.cfg, "attention_dir", "causal") == "causal"
        stateful = False
    else:
        causal = original.can_generate() and not original.config.is_encoder_decoder
        stateful = getattr(original, "_is_stateful", False)
    if not causal or stateful:
        raise InputError(
            "this model cannot be steered",
            expected="a decoder that reads left to right by attention alone",
            got=f"{type(model if original is None else original).__name__}, "
            + ("which carries a running state" if stateful else "which is an encoder or has one"),
            fix="Use a causal language model without recurrent layers.",
        )


# ---------------------------------------------------------------------------------------------------------- hook points


def site_name(model: SteerableModel, layer: int, site: str = DEFAULT_SITE) -> str:
    """Name of a hook point of the residual stream, checked against the model.

    Raises:
        SiteError: no such layer, or a site that cannot be steered the same way on both model classes.
        InputError: no model that can be steered, see `require_decoder`.
    """
    require_decoder(model)
    n_layers = model.cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise SiteError("layer", expected=f"an int in 0..{n_layers - 1}", got=layer)
    if site not in SITES:
        near = get_close_matches(site, SITES, n=2)
        raise SiteError(
            f"site {site!r}",
            expected=f"one of {SITES}",
            fix=f"Did you mean {' or '.join(near)}?" if near else None,
        )
    name = f"blocks.{layer}.{site}"
    hook_point(model, name)
    return name


def hook_point(model: SteerableModel, name: str) -> Any:
    """The hook point that stands at a name now: SAELens puts SAEs in the place of hook points, and new ones after them.

    Raises:
        SiteError: there is none, or an SAE stands in its place.
    """
    point = _standing(model, name)
    if point is not None:
        return point
    if any(key.startswith((f"{name}.", f"{_bridge_name(name)}.")) for key in model.hook_dict):
        raise SiteError(
            f"an SAE is spliced in at {name!r}",
            expected="a hook point",
            fix="Steer the stream that enters or leaves it at another point: the hook_resid_post of a layer and the"
            " hook_resid_pre of the next are one tensor; or take it out with model.reset_saes().",
        )
    near = get_close_matches(name, list(model.hook_dict), n=3)
    raise SiteError(f"the model has no hook point {name!r}", got=f"near matches {near}")


def _standing(model: SteerableModel, name: str) -> Any | None:
    """The hook point by its path: a Bridge makes its `hook_dict` anew at every look, which takes a millisecond."""
    for path in (_bridge_name(name), name) if kind_of(model) == "bridge" else (name,):
        try:
            found = reduce(getattr, path.split("."), model)
        except AttributeError:
            continue
        return found if hasattr(found, "fwd_hooks") else None
    return None


def _bridge_name(name: str) -> str:
    """A Bridge's own name of a point of the residual stream; SAELens' Bridge keeps no other up to date."""
    return name.replace(".hook_resid_pre", ".hook_in").replace(".hook_resid_post", ".hook_out")


def spliced(model: SteerableModel) -> tuple[str, ...]:
    """Hook points in whose places SAELens has put SAEs."""
    tail = ".hook_sae_output"
    return tuple(sorted(name.removesuffix(tail) for name in model.hook_dict if name.endswith(tail)))


class AddedHooks:
    """Hooks that were added to a model; `remove` takes away exactly these, in whatever order others come and go."""

    def __init__(self, model: SteerableModel, hooks: Sequence[tuple[str, Any]]) -> None:
        self._model: Any = model
        self._added: list[tuple[str, Any, Any]] = []
        with lock_of(model):
            try:
                for name, function in hooks:
                    point = hook_point(model, name)
                    self._added.append((name, point, function))  # first, so that an interrupt leaves nothing behind
                    point.add_hook(function)
            except BaseException:
                self.remove()
                raise

    def in_place(self) -> bool:
        """Whether the model runs through all of them; not after `reset_hooks`, nor where their point was replaced."""
        return all(
            _standing(self._model, name) is point and any(handle.user_hook is function for handle in point.fwd_hooks)
            for name, point, function in self._added
        )

    def remove(self) -> None:
        """Take the hooks away; calling it twice does nothing more."""
        if self._added:
            with lock_of(self._model):
                for _, point, function in self._added:
                    self._pop(point, function)
        self._added, self._model = [], None

    @staticmethod
    def _pop(point: Any, function: Any) -> None:
        own = [handle for handle in point.fwd_hooks if handle.user_hook is function]
        for handle in own:
            handle.hook.remove()
        point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.user_hook is not function]


@contextmanager
def hooks_added(model: SteerableModel, hooks: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Add hooks to a model and take away exactly these at the end, whatever happens in between.

    One thread at a time: another one that comes here with the same model waits until the first has taken its hooks
    away.
    """
    with lock_of(model):
        added = AddedHooks(model, hooks)
        try:
            yield
        finally:
            added.remove()


@contextmanager
def hooks_suspended(model: SteerableModel, which: Callable[[Any], bool] = lambda function: True) -> Iterator[None]:
    """Run the model without the hooks that `which` holds for; every hook is back in its place and order at the end.

    What is put on or taken off in between stays on or off.
    """
    with lock_of(model):
        stashed = []
        for point in {id(point): point for point in model.hook_dict.values()}.values():
            idle = [handle.hook.id for handle in point.fwd_hooks if which(handle.user_hook)]
            if idle:
                stashed.append((point, dict(point._forward_hooks), idle))
        try:
            for point, _, idle in stashed:
                for key in idle:
                    point._forward_hooks.pop(key, None)
            yield
        finally:
            for point, before, idle in stashed:
                now = dict(point._forward_hooks)
                back = set(idle) & {handle.hook.id for handle in point.fwd_hooks}
                kept = {key: hook for key, hook in before.items() if key in now or key in back}
                point._forward_hooks.clear()
                point._forward_hooks.update({**kept, **now})


_locks: "WeakKeyDictionary[Any, AbstractContextManager[Any]]" = WeakKeyDictionary()
_lock_of_locks = Lock()


def lock_of(model: SteerableModel) -> AbstractContextManager[Any]:
    """The lock under which this package puts hooks on a model for a moment; one thread may take it several times."""
    with _lock_of_locks:
        return _locks.setdefault(model, RLock())


# ------------------------------------------------------------------------------------------------------- forward passes


class Forward:
    """Forward passes over one batch that grows, with or without a KV cache; the same for both model classes.

    Call it with the new tokens; with a cache only these are run, without one the whole rectangle is run again. Returns
    the logits of the new tokens, [b new vocab]; with `layers` it stops after that many, for what hooks see, and returns
    nothing that is of use.
    """

    def __init__(self, model: SteerableModel, *, cache: bool, layers: int | None = None) -> None:
        require_decoder(model)
        self.model, self.kind, self.use_cache, self.layers = model, kind_of(model), cache, layers
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "b new"], mask: Bool[Tensor, "b new"]) -> Float[Tensor, "b new vocab"]:
        """Append `tokens` (real where `mask` is true) and return their logits."""
        new = tokens.shape[1]
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        options = {"return_type": "logits", "stop_at_layer": self.layers}
        if not self.use_cache:
            return self.model(self.tokens, attention_mask=self.mask.long(), **options)[:, -new:]
        if self._cache is None:
            self._cache = self._new_cache(len(tokens))
        if self.kind == "hooked":
            return self.model(tokens, attention_mask=mask.long(), past_kv_cache=self._cache, **options)
        return self.model(
            tokens, attention_mask=self.mask.long(), past_key_values=self._cache, use_cache=True, **options
        )

    def fork(self, times: int) -> None:
        """Go on with every row `times` times: of two rows, twice, come a, a, b, b."""
        assert self.tokens is not None and self.mask is not None and self._cache is not None
        self.tokens, self.mask = (rows.repeat_interleave(times, dim=0) for rows in (self.tokens, self.mask))
        if self.kind == "bridge":
            self._cache.batch_repeat_interleave(times)
            return
        self._cache.previous_attention_mask = self._cache.previous_attention_mask.repeat_interleave(times, dim=0)
        for entry in self._cache.entries:
            entry.past_keys = entry.past_keys.repeat_interleave(times, dim=0)
            entry.past_values = entry.past_values.repeat_interleave(times, dim=0)

    def _new_cache(self, batch_size: int) -> Any:
        if self.kind == "hooked":
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, batch_size)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.original_model.config)  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def run_up_to(
    model: SteerableModel,
    tokens: Int[Tensor, "b s"],
    mask: Bool[Tensor, "b s"],
    layer: int,
    hooks: Sequence[tuple[str, Any]],
) -> None:
    """Run token rows (real where `mask` is true) through the layers 0..`layer`, for what the hooks see."""
    with hooks_added(model, hooks):
        model(tokens, attention_mask=mask.long(), stop_at_layer=layer + 1)
