"""Why a gate decided as it did, and what every other rank would have decided."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import passes_of
from fsteer_lens.effects.measuring import MeasureOptions, Measuring
from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import choice, instance, optional, options_of, require_unset, seed_of, several, whole
from fsteer_lens.ground.estimates import Estimate, auroc, bootstrap
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.method.gates import OPEN, Gate
from fsteer_lens.method.linalg import require_matrix, require_tensor
from fsteer_lens.method.subspace_gates import SubspaceGate, subspace_leaves
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import GivenPrompt, as_prompt
from fsteer_lens.prompts.passes import BatchOptions
from fsteer_lens.prompts.tokens import token_texts
from fsteer_lens.reading.reader import Reader
from fsteer_lens.steering.steering import FineSteer, Steering


@dataclass(frozen=True, eq=False)
class RankSweep:
    """What a gate makes of two groups of queries at every rank.

    Attributes:
        ranks: 1 to r.
        ser: energy ratio of the queries that need steering, [n r].
        general_ser: of those to be left alone, [m r].
        gate_rate: share of the former for which the gate is open (g ≥ 0.5), [r].
        general_gate_rate: share of the latter, [r].
        auroc: of the energy ratio, the former against the latter, [r]; queries that are not finite are left out.
        effect: effect at the ranks that were asked for, with 95 % bootstrap intervals, {rank: estimate}.
    """

    ranks: tuple[int, ...]
    ser: Float[Tensor, "n r"]
    general_ser: Float[Tensor, "m r"]
    gate_rate: Float[Tensor, " r"]
    general_gate_rate: Float[Tensor, " r"]
    auroc: Float[Tensor, " r"]
    effect: dict[int, Estimate]

    def __repr__(self) -> str:
        return f"RankSweep({len(self.ranks)} ranks, {len(self.ser)} and {len(self.general_ser)} queries)"


def rank_sweep(
    steering: Gate | FineSteer,
    queries: Float[Tensor, "n d"],
    general: Float[Tensor, "m d"],
    *,
    layer: int | None = None,
    ranks: Iterable[int] = (),
    model: SteerableModel | None = None,
    contrasts: Iterable[Contrast] = (),
    seed: int = 0,
    **options: Unpack[MeasureOptions],
) -> RankSweep:
    """Energy ratios, gate rates and AUROC at every fitted rank from one product, and the effect at given ranks.

    Args:
        steering: a gate, or a steering that has one.
        queries: activations of prompts that need steering, [n d].
        general: activations of prompts to be left alone, [m d].
        layer: whose gate, of a steering with several layers.
        ranks: measure the effect with all gates of the steering at these; needs a FineSteer, `model` and `contrasts`.
        model: the model that the steering was fitted on.
        contrasts: prompts to be steered, held out from the fit, with both answers.
        seed: of the bootstrap.
        options: `effect` (None), a number per contrast; None takes `answer_margin`, in nats per token. `chat`,
            `chat_template_kwargs`, `prepend_bos` and `batch_size` (16) as in `answer_margin`; `progress` (True), show a
            progress bar.

    Raises:
        InputError: no gate, one without ranks, no finite query of either kind, a rank that was not fitted, or
            something missing for the effect, or given and without effect.
        ShapeError: activations of another width than the gate's.
    """
    run, seed = options_of("rank_sweep", Measuring, options), seed_of(seed)
    contrasts, ranks = ContrastSet(contrasts), several("ranks", ranks, "a list of ints")
    gate = steering if isinstance(steering, Gate) else gate_of(steering, layer)[1]
    if not gate.ranks:
        raise InputError("rank_sweep", expected="a gate on a subspace", got=f"{type(gate).__name__}, without ranks")
    if not len(require_tensor(queries, "queries")) or not len(require_tensor(general, "general")):
        raise InputError("rank_sweep", expected="queries of both kinds", got=(len(queries), len(general)))
    if not ranks:
        require_unset("no ranks=", model=model, contrasts=contrasts or None, effect=run.effect)
    if isinstance(steering, Gate):
        require_unset("a single gate", layer=layer)
    if ranks and (not isinstance(steering, FineSteer) or model is None or not contrasts):
        raise InputError("ranks=", expected="a FineSteer, model= and contrasts= to measure the effect with", got=ranks)
    opened, general_opened = (gate.gates(rows) >= OPEN for rows in (queries, general))
    r = opened.shape[-1]
    subspace = subspace_leaves(gate)[0].subspace
    ser, general_ser = (subspace.energy_ratios(rows)[:, :r] for rows in (queries, general))
    finite, general_finite = (rows[rows.isfinite().all(dim=1)] for rows in (ser, general_ser))
    area = auroc(finite, general_finite)
    variants = {whole("rank", rank): steering.at_rank(rank) for rank in ranks if isinstance(steering, FineSteer)}
    measured = {}
    if variants:
        assert model is not None and isinstance(steering, FineSteer)
        run = run.following(remembered(steering), model, [contrast.prompt for contrast in contrasts])
    with run.bar(len(variants), "measuring ranks") as advance:
        if variants:
            assert model is not None
            found = run.effects_of_each(model, list(variants.values()), contrasts, advance)
            measured = {rank: bootstrap(values, seed=seed) for rank, values in zip(variants, found, strict=True)}
    return RankSweep(
        tuple(range(1, r + 1)),
        ser,
        general_ser,
        opened.float().mean(dim=0),
        general_opened.float().mean(dim=0),
        area,
        measured,
    )


@dataclass(frozen=True, eq=False)
class GateExplanation:
    """Why a gate is open or closed for one prompt.

    Attributes:
        rank: the gate's rank.
        ratio: energy ratio s at that rank.
        gate: gate value g.
        is_open: whether g ≥ 0.5.
        threshold: energy ratio at which the gate opens.
        margin: how far s is on the open side of the threshold, s minus it for a gate that opens above; negative where
            the gate is closed.
        flip_rank: the smallest fitted rank at which the decision is the other one; None where there is none.
        flip_threshold: the threshold at which the decision flips: s itself. A gate that opens above its threshold
            closes when that is moved above s, and opens when it is moved down to s.
        directions: share of ‖h − μ‖² along each PCA direction, [r]; the first `rank` of them add up to s.
        tokens: the prompt's tokens as text, s of them.
        without: energy ratio of the prompt with one token left out, [s]; NaN where no token would be left, and before
            the last `limit` tokens.
        carried: s minus that: how much of the ratio goes with the token, [s].
    """

    rank: int
    ratio: float
    gate: float
    is_open: bool
    threshold: float
    margin: float
    flip_rank: int | None
    flip_threshold: float
    directions: Float[Tensor, " r"]
    tokens: tuple[str, ...]
    without: Float[Tensor, " s"]
    carried: Float[Tensor, " s"]

    def __repr__(self) -> str:
        side = "open" if self.is_open else "closed"
        return f"GateExplanation({side}, s={self.ratio:.3f}, threshold={self.threshold:.3f}, rank={self.rank})"


def explain_gate(
    model: SteerableModel,
    steering: Steering,
    prompt: GivenPrompt,
    *,
    layer: int | None = None,
    limit: int | None = 256,
    **options: Unpack[BatchOptions],
) -> GateExplanation:
    """Tell which directions and which tokens of a prompt carried a gate's energy ratio, and what would flip it.

    Takes a forward pass of the prompt for every token that is left out.

    A token's part is found by leaving it out: the prompt is run once more without it. That is what the decision would
    have been on that shorter prompt; parts of tokens do not add up, and two tokens that say the same cover for each
    other.

    Args:
        model: the model that the steering was fitted on.
        steering: a steering with a gate on one subspace.
        prompt: the prompt.
        layer: whose gate; None takes the only one.
        limit: leave out at most so many tokens one by one, the last ones of the prompt; None takes all.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how the prompt becomes
            tokens, see `tokens.prompt_ids`; `batch_size` (16), shortened prompts per forward pass.

    Raises:
        InputError: no steering, no gate, one that is composed (explain one of its leaves, `steering.with_gate(leaf)`),
            or an ambiguous layer.
        NonFiniteError: the model gave NaN or infinity.
    """
    where, gate = gate_of(steering, layer)
    if not isinstance(gate, SubspaceGate):
        raise InputError(
            "explain_gate",
            expected="a gate on one subspace",
            got=type(gate).__name__,
            fix="Explain its leaves one by one: steering.with_gate(gate.leaves[0]).",
        )
    steering.session_on(model)  # was it fitted on this model?
    asked = as_prompt(prompt)
    passes = passes_of("explain_gate", options, model, steering, [asked])
    tokenisation = passes.tokenisation(model)
    ids = tuple(tokenisation.ids(asked))
    limit = optional(whole, "limit", limit, 0, why="or None for all")
    first = 0 if limit is None else max(0, len(ids) - limit)
    shorter = [ids[:place] + ids[place + 1 :] for place in range(first, len(ids))] if len(ids) > 1 else []
    reader = Reader(model, where, steering.site, batch_size=passes.batch_size)
    rows = [ids, *shorter]
    h = reader.prompts(rows, tokenisation.tails(rows), (gate.read,))[gate.read][where]
    h = require_matrix(h, f"activations at layer {where}")
    ratios = gate.subspace.energy_ratio(h, gate.rank).cpu()
    ratio, without = float(ratios[0]), torch.full((len(ids),), torch.nan, dtype=torch.float32, device="cpu")
    without[len(ids) - len(shorter) :] = ratios[1:]
    gates = gate.gates(h[0]).cpu()
    is_open = bool(gates[gate.rank - 1] >= OPEN)
    other = [rank for rank, value in enumerate(gates.tolist(), 1) if (value >= OPEN) != is_open]
    coordinates = gate.subspace.coordinates(h[0])
    total = gate.subspace.distance(h[0]).square().clamp(min=torch.finfo(torch.float32).tiny)
    return GateExplanation(
        rank=gate.rank,
        ratio=ratio,
        gate=float(gates[gate.rank - 1]),
        is_open=is_open,
        threshold=gate.threshold,
        margin=(ratio - gate.threshold) * (1 if gate.opens_above else -1),
        flip_rank=min(other, default=None),
        flip_threshold=ratio,
        directions=(coordinates.square() / total).cpu(),
        tokens=token_texts(model, ids),
        without=without,
        carried=ratio - without,
    )


def gate_of(steering: Steering, layer: int | None) -> tuple[int, Gate]:
    """The layer that is meant, the given one or the only one with a gate, and its gate.

    Raises:
        InputError: no steering, or no gate there.
    """
    instance("steering", steering, Steering, "a steering with a gate")
    gates = {at: gate for at in steering.hooked_layers if (gate := steering.gate_at(at)) is not None}
    only = next(iter(gates)) if len(gates) == 1 else None
    chosen = choice("layer", only if layer is None else layer, gates, "one of the layers with a gate,")
    return chosen, gates[chosen]
