"""Where the steering change goes: through the later layers and to later tokens."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import passes_of
from fsteer_lens.errors import SiteError
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.attaching import hooks_added, unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import hook_point
from fsteer_lens.prompts.forms import GivenPrompt, as_prompt
from fsteer_lens.prompts.passes import FormatOptions
from fsteer_lens.prompts.tokens import token_texts
from fsteer_lens.run.teacher_forcing import answered, batches, session_for


@dataclass(frozen=True, eq=False)
class Propagation:
    """The difference that steering makes to the residual stream of one text, after every layer and at every position.

    Δ is the steered minus the unsteered `hook_resid_post`. It is taken apart along its own direction:

        ‖Δ_l‖ = carried + edit + attention + mlp

    where each term is the component along Δ_l of what came from the layer below, of what steering added at this layer,
    and of the difference in what the layer's attention and MLP add to the stream.

    Attributes:
        tokens: text of every token that the model read, s of them.
        prompt_length: how many of them are the prompt's.
        edited_layers: layers where the stream was edited.
        norm: ‖Δ‖, [layers s].
        size: ‖Δ‖ / ‖unsteered residual stream‖, [layers s].
        cosine: of Δ with the mean edit of the first edited layer, −1 to 1, [layers s]; 0 where Δ is 0.
        carried, edit, attention, mlp: the terms above, in the units of the residual stream, [layers s]; negative where
            one of them works against the change.
    """

    tokens: tuple[str, ...]
    prompt_length: int
    edited_layers: tuple[int, ...]
    norm: Float[Tensor, "layers s"]
    size: Float[Tensor, "layers s"]
    cosine: Float[Tensor, "layers s"]
    carried: Float[Tensor, "layers s"]
    edit: Float[Tensor, "layers s"]
    attention: Float[Tensor, "layers s"]
    mlp: Float[Tensor, "layers s"]

    def __repr__(self) -> str:
        return f"Propagation({self.norm.shape[0]} layers, {len(self.tokens)} tokens, edited at {self.edited_layers})"


def propagation(
    model: SteerableModel,
    steering: HookObject,
    prompt: GivenPrompt,
    answer: str | Sequence[int] = (),
    **options: Unpack[FormatOptions],
) -> Propagation:
    """Follow the steering change of one text through the layers, from one steered and one unsteered pass.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what to put on the model.
        prompt: the prompt.
        answer: text or ids of an answer, such as the steered one; its last token is not read.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how the prompt becomes
            tokens, see `tokens.prompt_ids`.

    Raises:
        InputError: an answer of no token.
        ContextLengthError: the text does not fit into the context.
        MismatchError, SiteError: the steering does not fit the model.
    """
    given, asked = len(answer) > 0, [as_prompt(prompt)]
    passes = passes_of("propagation", options, model, steering, asked, FormatOptions.__annotations__)
    rows = answered(model, asked, [answer] if given else None, passes)
    ((_, batch),) = batches(model, rows, 1)
    session = session_for(model, batch, rows, steering)
    base = _read(model, batch.tokens, nullcontext())
    steered = _read(model, batch.tokens, session.step(model, fresh=True))
    change = {name: steered[name] - base[name] for name in base}
    after = change["post"]
    below = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
    edit = change["pre"] - below + after - change["before"]
    direction = after / after.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    layers = tuple(sorted({layer for link in steering.links for layer in link.edited_layers}))
    first = edit[min(layers)].mean(dim=0) if layers else torch.zeros_like(edit[0, 0])
    return Propagation(
        tokens=token_texts(model, rows[0].fed),
        prompt_length=len(rows[0].prompt),
        edited_layers=layers,
        norm=after.norm(dim=-1),
        size=after.norm(dim=-1) / base["post"].norm(dim=-1).clamp(min=1e-30),
        cosine=direction @ (first / first.norm().clamp(min=1e-30)),
        carried=(below * direction).sum(dim=-1),
        edit=(edit * direction).sum(dim=-1),
        attention=(change["attention"] * direction).sum(dim=-1),
        mlp=(change["mlp"] * direction).sum(dim=-1),
    )


@torch.no_grad()
def _read(
    model: SteerableModel, tokens: Tensor, steering: AbstractContextManager[Any]
) -> dict[str, Float[Tensor, "layers s d"]]:
    """The stream of one text: entering each layer and leaving it with all edits, leaving it before them, and its parts.

    Hooks run in the order in which they were put there, so what reads before the edits is put on before `steering`.
    """
    n_layers = model.cfg.n_layers
    seen: dict[tuple[str, int], Tensor] = {}

    def reader(name: str, site: str) -> list[tuple[str, Any]]:
        def keep(layer: int) -> Any:
            def hook_function(activation: Tensor, hook: Any) -> None:
                seen[name, layer] = activation[0].float().cpu()

            return hook_function

        return [(f"blocks.{layer}.{site}", keep(layer)) for layer in range(n_layers)]

    parallel = not _has(model, "blocks.0.hook_resid_mid")
    middle = [("attention", "hook_attn_out")] if parallel else [("middle", "hook_resid_mid")]
    later = [
        hook for pair in [("pre", "hook_resid_pre"), *middle, ("post", "hook_resid_post")] for hook in reader(*pair)
    ]
    with unsteered(model), hooks_added(model, reader("before", "hook_resid_post")), steering, hooks_added(model, later):
        model(tokens, return_type="logits")
    read = {name: torch.stack([seen[name, layer] for layer in range(n_layers)]) for name in {key for key, _ in seen}}
    if not parallel:
        read["attention"] = read.pop("middle") - read["pre"]
    read["mlp"] = read["before"] - read["pre"] - read["attention"]
    return read


def _has(model: SteerableModel, name: str) -> bool:
    try:
        hook_point(model, name)
    except SiteError:
        return False
    return True
