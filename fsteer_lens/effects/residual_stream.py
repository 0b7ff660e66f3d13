"""Where the steering change goes: through the later layers and to later tokens."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import passes_of
from fsteer_lens.ground.checks import several
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.forms import GivenPrompt, as_prompt
from fsteer_lens.prompts.passes import FormatOptions
from fsteer_lens.prompts.tokens import token_texts
from fsteer_lens.run.streams import change_of, read_streams
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
    asked = [as_prompt(prompt)]
    given = len(answer if isinstance(answer, str) else several("answer", answer, "a text or a list of token ids")) > 0
    passes = passes_of("propagation", options, model, steering, asked, FormatOptions.__annotations__)
    rows = answered(model, asked, [answer] if given else None, passes)
    ((_, batch),) = batches(model, rows, 1)
    session = session_for(model, batch, rows, steering)
    base = read_streams(Forward(model, cache=False), batch, nullcontext())
    steered = read_streams(Forward(model, cache=False), batch, session.step(model, fresh=True))
    change, direction, edit = change_of(base, steered)
    layers = tuple(sorted({layer for link in steering.links for layer in link.edited_layers}))
    first = edit[min(layers)].mean(dim=0) if layers else torch.zeros_like(edit[0, 0])
    return Propagation(
        tokens=token_texts(model, rows[0].fed),
        prompt_length=len(rows[0].prompt),
        edited_layers=layers,
        cosine=direction @ (first / first.norm().clamp(min=1e-30)),
        **change._asdict(),
    )
