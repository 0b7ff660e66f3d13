"""What a replay records of a text that was generated: two passes over the whole of it, with and without steering."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.ground.spread import every
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.hooks.opening import Read
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel, attention_window
from fsteer_lens.models.forward import Forward
from fsteer_lens.models.head import logit_lens
from fsteer_lens.prompts.tokens import pad, require_tokenizer, token_texts
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.decoding import Rules, decode
from fsteer_lens.run.recorder import filled, without_fill
from fsteer_lens.run.sampling import Sampling
from fsteer_lens.run.stopping import Stop
from fsteer_lens.run.streams import Stream, change_of, read_streams
from fsteer_lens.run.teacher_forcing import session_for
from fsteer_lens.steering.steering import Steering
from fsteer_lens.trace.replay import Replay, Scored
from fsteer_lens.trace.steps import Steps

MOST_PROMPTS = 8
MOST_TOKENS = 256
MOST_LAYERS = 48
RELEASED = 4
"""Tokens of a text at which the unsteered model goes on by itself: those of largest KL that it would not have said."""
RELEASED_TOKENS = 8
LENS_NUMBERS = 2**23
"""Log-probabilities of the lens that are held at a time, over layers, tokens and vocabulary: 32 MiB in float32."""


@torch.no_grad()
def replay_of(
    model: SteerableModel, row: Answered, steps: Steps, steering: HookObject, read: Read | None, stop: Stop
) -> Replay:
    """The replay of one prompt with its answer, whose steps were compared."""
    batch = pad(model, [row.fed], "right")
    session = session_for(model, batch, [row], steering, read)
    plain_run = Forward(model, cache=True)
    base = read_streams(plain_run, batch, nullcontext())
    steered = read_streams(Forward(model, cache=False), batch, session.step(model, fresh=True))
    change, _, _ = change_of(base, steered)
    edited = sorted({layer for link in steering.links for layer in link.edited_layers})
    layers = sorted({*every(range(model.cfg.n_layers), MOST_LAYERS - len(edited)), *edited})
    displaced = _displaced(steps)
    words = torch.tensor([row.answer, displaced], dtype=torch.long, device="cpu")
    said, plain = (stream["post"][layers, len(row.prompt) - 1 :] for stream in (steered, base))
    alike = sum(layer < min(edited, default=model.cfg.n_layers) for layer in layers)
    length = change.norm[layers].clamp(min=1e-30)
    return Replay(
        layers=tuple(layers),
        edited=tuple(edited),
        size=change.size[layers],
        carried=change.carried[layers] / length,
        edit=change.edit[layers] / length,
        attention=change.attention[layers] / length,
        mlp=change.mlp[layers] / length,
        displaced=tuple(require_tokenizer(model).batch_decode([[token] for token in displaced])),
        lens=_lens(model, said, plain, words, alike),
        released=dict(_released(plain_run, row, steps, stop)),
        scores=tuple(_scores(steering, steered["before"], len(row.prompt), session.states[0].tails)),
    )


def _displaced(steps: Steps) -> list[int]:
    """Of every step the unsteered model's likeliest token that was not said."""
    assert steps.baseline_top_ids is not None
    pairs = zip(steps.tokens[0].tolist(), steps.baseline_top_ids[0].tolist(), strict=True)
    return [next(token for token in top if token != said) for said, top in pairs]


def _lens(
    model: SteerableModel, steered: Stream, base: Stream, words: Int[Tensor, "2 n"], alike: int
) -> Float[Tensor, "2 2 layers n"]:
    """Probabilities of two words at each of n positions, in both runs, which are one in the first `alike` layers."""
    of_each, at_once = [], max(1, LENS_NUMBERS // (base.shape[1] * model.cfg.d_vocab))
    for layers in torch.cat([steered, base[alike:]]).split(at_once):
        logprobs = logit_lens(model, layers)
        of_each.append(logprobs.gather(-1, words.T.to(logprobs.device).expand(len(layers), -1, -1)).exp().cpu())
    of_steered, of_base = torch.cat(of_each).movedim(-1, 0).split([len(steered), len(base) - alike], dim=1)
    return torch.stack([of_steered, torch.cat([of_steered[:, :alike], of_base], dim=1)], dim=1)


def _released(plain_run: Forward, row: Answered, steps: Steps, stop: Stop) -> Iterator[tuple[int, tuple[str, ...]]]:
    """How the unsteered model goes on, greedily, where it would have said something else; it has read the text."""
    assert steps.kl is not None and steps.baseline_top_ids is not None
    other = steps.baseline_top_ids[0, :, 0] != steps.tokens[0]
    order = steps.kl[0].nan_to_num(0).argsort(descending=True).tolist()
    chosen = sorted([step for step in order if other[step]][:RELEASED])
    if not chosen:
        return
    model = plain_run.model
    before = [(*row.prompt, *row.answer[:step]) for step in chosen]
    if len(row.fed) + RELEASED_TOKENS <= attention_window(model):
        seen = torch.tensor([len(ids) - 1 for ids in before], dtype=torch.long, device="cpu")
        forward = plain_run.fork_rows(torch.zeros_like(seen), seen=seen)
        answers = _gone_on(forward, [ids[-1:] for ids in before], RELEASED_TOKENS, stop)
    else:
        answers = [
            _gone_on(Forward(model, cache=True), [ids], min(RELEASED_TOKENS, model.cfg.n_ctx - len(ids)), stop)[0]
            for ids in before
        ]
    for step, ids, answer in zip(chosen, before, answers, strict=True):
        yield step, token_texts(model, answer, ids)


def _gone_on(forward: Forward, rows: Sequence[Sequence[int]], n_new: int, stop: Stop) -> list[tuple[int, ...]]:
    """So many tokens at most that the unsteered model says, greedily, after what it has run and these rows."""
    model, rules = forward.model, Rules(Sampling(), stop, n_new, cache=True)
    with unsteered(model):
        steps = decode(model, pad(model, rows, "left"), None, rules, range(len(rows)), forward)
        made = [filled(one.chosen, one.alive) for one in steps]
    return without_fill(torch.stack(made, dim=1))


def _scores(steering: HookObject, before: Stream, n_prompt: int, tails: Tensor | None) -> Iterator[Scored]:
    """The score of every gate at every position of the stream before the edits."""
    for number, link in enumerate(steering.links):
        if not isinstance(link, Steering):
            continue
        for layer in link.hooked_layers:
            gate = link.gate_at(layer)
            if gate is None:
                continue
            h = _means(before[layer]) if gate.read == "mean" else before[layer]
            tail = int(tails[0]) if gate.read == "turn_end" and tails is not None else 0
            yield Scored(
                layer=layer,
                link=number,
                name=gate.score_name,
                score=gate.score(h).float().cpu(),
                threshold=float(gate.threshold),
                opens_above=gate.opens_above,
                read=gate.read,
                position=n_prompt - 1 - tail,
                rank=getattr(gate, "rank", None) if gate.ranks else None,
            )


def _means(h: Float[Tensor, "s d"]) -> Float[Tensor, "s d"]:
    """The mean over all positions up to each but the first, as a gate reads it that reads means."""
    counts = torch.arange(1, len(h), dtype=torch.float32, device=h.device).unsqueeze(1)
    return torch.cat([h[:1], h[1:].cumsum(dim=0) / counts])
