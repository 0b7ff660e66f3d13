"""What the experts are: the tokens that they promote, what goes missing without them, how prompts are routed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.measuring import MeasureOptions, Measuring
from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import choice, instance, optional, optional_text, options_of, several, whole
from fsteer_lens.ground.estimates import Estimate, bootstrap
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.linalg import require_tensor, require_width
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.models.head import head_logits
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.tokens import require_tokenizer
from fsteer_lens.reading.reader import read_prompts
from fsteer_lens.steering.steering import FineSteer


@torch.no_grad()
def expert_tokens(
    model: SteerableModel, experts: Experts, *, top: int = 10
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """The tokens that each expert's prototype promotes most, read through the unembedding.

    A prototype c goes through the final normalisation and the unembedding by itself, as in the logit lens; what an
    activation of zero gives is subtracted, and the mean over the vocabulary too: unembed(norm(c)) − unembed(norm(0)).
    That is the direct path alone: what later layers make of the expert is not in it, so an expert that acts early, or
    at the prompt, may promote tokens that say little.

    Args:
        model: the model that the experts were fitted on.
        experts: the experts.
        top: tokens per expert.

    Returns:
        For each expert its tokens with their logits, the largest first. Logits are relative to the vocabulary's mean,
        for a direction scaled to the size that the final normalisation gives.

    Raises:
        InputError: `top` out of range, or a steering instead of its experts.
        ShapeError: experts of another width than the model's.
    """
    require_steerable(model)
    instance("expert_tokens", experts, Experts, "Experts", fix="Give steering.experts_at(layer).")
    stream = torch.empty(model.cfg.d_model, dtype=torch.float32, device="meta")
    require_width(stream, "the model's residual stream", experts.d_model)
    tokenizer = require_tokenizer(model)
    n_tokens = min(model.cfg.d_vocab, len(tokenizer))
    top = whole("top", top, 1, n_tokens)
    logits = head_logits(model, torch.cat([experts.prototypes, torch.zeros_like(experts.prototypes[:1])]))
    promoted = logits[:-1, :n_tokens] - logits[-1:, :n_tokens]
    best = (promoted - promoted.mean(dim=-1, keepdim=True)).topk(top, dim=-1)
    return tuple(
        tuple(zip(tokenizer.batch_decode([[token] for token in ids]), values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


@dataclass(frozen=True, eq=False)
class Knockout:
    """What is lost when one expert is removed.

    Attributes:
        experts: numbers of the experts that were removed one by one; those that are switched off are not among them.
        labels: label of each contrast, n of them.
        full: effect on each contrast with all experts, [n].
        removed: effect on each contrast without each of all k experts, [k n]; NaN for one that was off already.
        weights: weight α of each expert for each contrast, [k n].
        effect_name: of the effect, with its unit.
        names: of all k experts, where they have any.
    """

    experts: tuple[int, ...]
    labels: tuple[str, ...]
    full: Float[Tensor, " n"]
    removed: Float[Tensor, "k n"]
    weights: Float[Tensor, "k n"]
    effect_name: str
    names: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"Knockout({len(self.experts)} experts, {len(self.groups)} labels, {len(self.labels)} contrasts)"

    @property
    def groups(self) -> tuple[str, ...]:
        """The labels that there are, in alphabetical order."""
        return tuple(sorted(set(self.labels)))

    @property
    def loss(self) -> Float[Tensor, "k labels"]:
        """Mean effect lost per expert and label; positive where the expert helped."""
        return self._by_label(self.full - self.removed)

    @property
    def mean_weights(self) -> Float[Tensor, "k labels"]:
        """Mean weight of each expert for the contrasts of each label, in [0, 1]."""
        return self._by_label(self.weights)

    def estimate(self, expert: int, label: str, *, seed: int = 0) -> Estimate:
        """Effect lost on one label without one expert, with its 95 % paired bootstrap interval."""
        expert = choice("expert", expert, list(self.experts), "one of")
        label = choice("label", label, list(self.groups), "one of")
        lost = (self.full - self.removed[expert])[self._has(label)]
        return bootstrap(lost, seed=seed)

    def _has(self, label: str) -> Tensor:
        return torch.tensor([one == label for one in self.labels], dtype=torch.bool, device="cpu")

    def _by_label(self, values: Float[Tensor, "k n"]) -> Float[Tensor, "k labels"]:
        return torch.stack([values[:, self._has(label)].mean(dim=1) for label in self.groups], dim=1)


def expert_knockout(
    model: SteerableModel,
    steering: FineSteer,
    contrasts: Iterable[Contrast],
    *,
    layer: int | None = None,
    queries: Float[Tensor, "n d"] | None = None,
    **options: Unpack[MeasureOptions],
) -> Knockout:
    """Remove the experts one by one and see which label loses how much of the effect.

    That an expert has a large weight for a label may only mean that it was trained to; that its removal costs the label
    something shows that it matters.

    Args:
        model: the model that the steering was fitted on.
        steering: the steering; experts that are switched off already are left out.
        contrasts: prompts to be steered, held out from the fit, with labels.
        layer: whose experts, of a steering with several layers; the other layers keep theirs.
        queries: query activations of the contrasts at that layer, where they have been read already, [n d].
        options: `effect` (None), a number per contrast; None takes `answer_margin`, in nats per token. `chat`,
            `chat_template_kwargs`, `prepend_bos` and `batch_size` (16) as in `answer_margin`; `progress` (True), show a
            progress bar.

    Raises:
        InputError: no contrasts, another number of queries, fewer than two experts that are on, or an unknown layer.
    """
    run = options_of("expert_knockout", Measuring, options)
    where = instance("expert_knockout", steering, FineSteer, "a FineSteer").layer_of(layer)
    contrasts = ContrastSet(contrasts)
    experts = steering.experts_at(where)
    on = tuple(index for index, enabled in enumerate(experts.enabled) if enabled)
    if len(on) < 2 or not len(contrasts):
        raise InputError("expert_knockout", expected="contrasts, and at least two experts that are on", got=on)
    run = run.following(remembered(steering), model, [contrast.prompt for contrast in contrasts])
    if queries is None:
        found = read_prompts(model, contrasts.prompts, run, where, (steering.read,), site=steering.site)
        queries = found[steering.read][where]
    if len(require_tensor(queries, "queries")) != len(contrasts):
        raise InputError("queries", expected=f"one for each of {len(contrasts)} contrasts", got=len(queries))
    without = [steering.with_experts(experts.without_expert(index), where) for index in on]
    with run.bar(1 + len(on), "removing experts") as advance:
        full, *left = run.effects_of_each(model, [steering, *without], contrasts, advance)
    removed = torch.full((experts.n_experts, len(contrasts)), torch.nan, dtype=torch.float32, device="cpu")
    removed[list(on)] = torch.stack(left).to(removed)
    return Knockout(
        on,
        tuple(str(contrast.label) for contrast in contrasts),
        full,
        removed,
        experts.route(queries).T.cpu(),
        run.effect_name,
        experts.names,
    )


@dataclass(frozen=True)
class RoutingReport:
    """How experts share prompts among them.

    Attributes:
        agreement: share of prompts whose strongest expert is the one nearest, by cosine, to the prompt's own shift;
            None without shifts.
        nmi: normalised mutual information of strongest expert and label, 0 to 1, over the prompts that have one; None
            without labels.
        entropy: mean over prompts of the entropy of their weights, in nats; 0 where one expert takes all, log K where
            all weigh the same.
        usage_entropy: entropy of the mean weights, in nats; near 0 where the routing has collapsed on one expert.
        dead: share of experts that are nobody's strongest.
        prototype_share: mean of ‖C α‖ / ‖v‖, the prototypes' part of the vector.
        residual_share: mean of ‖U β‖ / (‖C α‖ + ‖U β‖), as `figures.expert_mix` shows it for one prompt.
    """

    agreement: float | None
    nmi: float | None
    entropy: float
    usage_entropy: float
    dead: float
    prototype_share: float
    residual_share: float


def routing_report(
    experts: Experts,
    queries: Float[Tensor, "n d"],
    *,
    shifts: Float[Tensor, "n d"] | None = None,
    labels: Iterable[str | None] | None = None,
) -> RoutingReport:
    """Describe the routing of prompts, as a rule of ones that the fit did not see.

    Args:
        experts: the experts.
        queries: query activations, [n d].
        shifts: the same prompts' own shifts, [n d], for the agreement.
        labels: what each prompt is about, n of them, for the NMI.

    Raises:
        InputError: no queries, or another number of shifts or labels.
        ShapeError: activations of another width than the experts'.
    """
    from sklearn.metrics import normalized_mutual_info_score

    instance("routing_report", experts, Experts, "Experts", fix="Give steering.experts_at(layer).")
    if require_tensor(queries, "queries").ndim != 2 or not len(queries):
        raise InputError("queries", expected="at least one row [n, d]", got=list(queries.shape))
    optional(lambda name, value: require_tensor(value, name), "shifts", shifts)
    if labels is not None:
        labels = [optional_text("label", label) for label in several("labels", labels, "a label for each query")]
    for name, given in (("shifts", shifts), ("labels", labels)):
        if given is not None and len(given) != len(queries):
            raise InputError(name, expected=f"one for each of {len(queries)} queries", got=len(given))
    parts = experts.parts(queries)
    strongest = parts.weights.argmax(dim=-1)
    length = parts.vector.norm(dim=-1).clamp(min=1e-12)
    on = sum(experts.enabled)
    known = [(label, one) for label, one in zip(labels or (), strongest.tolist(), strict=False) if label is not None]
    nmi = normalized_mutual_info_score(*zip(*known, strict=True)) if known else None
    beside = parts.residual_part.norm(dim=-1)
    whole = (parts.prototype_part.norm(dim=-1) + beside).clamp(min=1e-12)
    return RoutingReport(
        agreement=None if shifts is None else float((strongest == experts.nearest(shifts)).float().mean()),
        nmi=None if nmi is None else float(nmi),
        entropy=float(torch.special.entr(parts.weights).sum(dim=-1).mean()),
        usage_entropy=float(torch.special.entr(parts.weights.mean(dim=0)).sum()),
        dead=1 - len(strongest.unique()) / on,
        prototype_share=float((parts.prototype_part.norm(dim=-1) / length).mean()),
        residual_share=float((beside / whole).mean()),
    )
