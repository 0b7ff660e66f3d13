"""The controller of the experts: the learned maps W_Q, W_K and β, and how they are trained; and what stands in their
stead where experts are fitted in closed form."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.ground.checks import finite, normalised, seed_of, switch, whole
from fsteer_lens.ground.progress import progress_bar


class Controller(NamedTuple):
    """The learned maps: W_Q, W_K and the two layers of β, each a weight [out in] with its bias [out]."""

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    @property
    def axes(self) -> dict[str, str]:
        """The axes of each map, as `require_shapes` reads them."""
        return {
            "query_weight": "d_k d",
            "query_bias": "d_k",
            "key_weight": "d_k d",
            "key_bias": "d_k",
            "hidden_weight": "hidden d",
            "hidden_bias": "hidden",
            "output_weight": "m hidden",
            "output_bias": "m",
        }

    def logits(self, h: Float[Tensor, "*batch d"], prototypes: Float[Tensor, "k d"]) -> Float[Tensor, "*batch k"]:
        """(W_K C)ᵀ (W_Q h) / √d_k, with d_k = d."""
        keys = F.linear(prototypes, self.key_weight, self.key_bias)
        return F.linear(h, self.query_weight, self.query_bias) @ keys.T / math.sqrt(keys.shape[-1])

    def logits_of_many(self, h: Float[Tensor, "n d"], prototypes: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """The same for n ≫ k: W_Qᵀ (W_K C) comes first, so that nothing of width d_k is made for each h."""
        keys = F.linear(prototypes, self.key_weight, self.key_bias)
        return F.linear(h, keys @ self.query_weight, keys @ self.query_bias) / math.sqrt(keys.shape[-1])

    def coefficients(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch m"]:
        """β(h)."""
        hidden = F.relu(F.linear(h, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.output_weight, self.output_bias)


class QuadraticController(NamedTuple):
    """The maps of experts that were fitted in closed form, W [out in] and b [out]: logits are affine in h, and so is β,
    but for zᵀ Q z of the q coordinates z of h/‖h‖, Q [m q q]; q is 0 where that was not clearly better. Beyond the
    reach of the fit, where the r numbers of `reach` are longer than 1, β is divided by their squared length."""

    route_weight: Tensor
    route_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    view_weight: Tensor
    view_bias: Tensor
    forms: Tensor
    reach_weight: Tensor
    reach_bias: Tensor

    @property
    def axes(self) -> dict[str, str]:
        """The axes of each map, as `require_shapes` reads them."""
        return {
            "route_weight": "k d",
            "route_bias": "k",
            "output_weight": "m d",
            "output_bias": "m",
            "view_weight": "q d",
            "view_bias": "q",
            "forms": "m q q",
            "reach_weight": "r d",
            "reach_bias": "r",
        }

    def logits(self, h: Float[Tensor, "*batch d"], prototypes: Float[Tensor, "k d"]) -> Float[Tensor, "*batch k"]:
        """log π + τ (h − h̄) A, whatever the prototypes."""
        return F.linear(h, self.route_weight, self.route_bias)

    def coefficients(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch m"]:
        """β(h)."""
        beyond = F.linear(h, self.reach_weight, self.reach_bias).square().sum(dim=-1, keepdim=True)
        affine = F.linear(h, self.output_weight, self.output_bias)
        if not len(self.view_bias):
            return affine / beyond.clamp(min=1)
        z = F.linear(F.normalize(h, dim=-1), self.view_weight, self.view_bias)
        products = (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        return (affine + F.linear(products, self.forms.flatten(-2))) / beyond.clamp(min=1)


@dataclass(frozen=True)
class Training:
    """How the controller is trained; the same names, and what they mean, in `fit_experts`."""

    route_loss: float
    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int
    standardize: bool
    validation: float
    clip: float
    seed: int

    def __post_init__(self) -> None:
        normalised(
            self,
            route_loss=finite("route_loss", self.route_loss, 0),
            learning_rate=finite("learning_rate", self.learning_rate, above=0),
            weight_decay=finite("weight_decay", self.weight_decay, 0),
            epochs=whole("epochs", self.epochs, 1),
            patience=whole("patience", self.patience, 1),
            standardize=switch("standardize", self.standardize),
            validation=finite("validation", self.validation, 0, below=1),
            clip=finite("clip", self.clip, above=0),
            seed=seed_of(self.seed),
        )


def train_controller(
    h: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    prototypes: Float[Tensor, "k d"],
    residual_basis: Float[Tensor, "d m"],
    clusters: Int[Tensor, " n"],
    training: Training,
    *,
    progress: bool,
) -> tuple[Controller, int, Int[Tensor, " n_valid"]]:
    """Train on mean ‖v(h) − δ‖² (+ `route_loss` times the cross-entropy of α against the clusters), AdamW, full batch.

    Args:
        h, delta: queries and shifts, [n d].
        prototypes, residual_basis: C [k d] and U [d m], frozen.
        clusters: cluster of every query, [n].
        training: the options; a share of the queries, drawn at random, is kept for early stopping.
        progress: show a progress bar.

    Returns:
        The controller of the best epoch in the units of `h` and `delta`, that epoch, and the rows that were kept.
    """
    n, d_model = h.shape
    n_valid = min(round(training.validation * n), n - 1)
    ones = h.new_ones(())
    centre, spread, length, size = h.new_zeros(d_model), ones, ones, ones
    if training.standardize:
        centre = h.mean(dim=0)
        spread = (h - centre).square().mean().sqrt().clamp(min=1e-12)
        length = delta.square().sum(dim=1).mean().sqrt()
        size = prototypes.square().mean().sqrt().clamp(min=1e-12)
    x, target, mixed, keyed = (h - centre) / spread, delta / length, prototypes / length, prototypes / size

    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the GPUs' generators as well
        torch.default_generator.manual_seed(training.seed)
        sizes = [(d_model, d_model)] * 3 + [(d_model, residual_basis.shape[1])]
        layers = [torch.nn.Linear(*pair, dtype=h.dtype, device="cpu") for pair in sizes]
        order = torch.randperm(n, device="cpu")
    parameters = [p.to(h.device).detach().requires_grad_() for layer in layers for p in (layer.weight, layer.bias)]
    controller = Controller(*parameters)
    valid_rows, train_rows = order[:n_valid].to(h.device), order[n_valid:].to(h.device)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)

    def part(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[rows], target[rows], clusters[rows]

    def loss(x: Tensor, target: Tensor, clusters: Tensor) -> Tensor:
        logits = controller.logits_of_many(x, keyed)
        vector = logits.softmax(dim=-1) @ mixed + controller.coefficients(x) @ residual_basis.T
        error = (vector - target).square().sum(dim=1).mean()
        return error + training.route_loss * F.cross_entropy(logits, clusters) if training.route_loss else error

    train, watched_part = part(train_rows), part(valid_rows if n_valid else train_rows)

    best_loss, best_epoch, best = math.inf, 0, [p.detach().clone() for p in parameters]
    with torch.enable_grad(), progress_bar(training.epochs, "training the experts", progress) as advance:
        for epoch in range(1, training.epochs + 1):
            optimizer.zero_grad()
            objective = loss(*train)
            objective.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.clip)
            with torch.device("cpu"):  # where it counts its steps, whatever the default device
                optimizer.step()
            advance(1)
            with torch.no_grad():
                watched = float(loss(*watched_part))
            if watched < best_loss:
                best_loss, best_epoch, best = watched, epoch, [p.detach().clone() for p in parameters]
            elif n_valid and epoch - best_epoch >= training.patience:
                break
    query_weight, query_bias, key_weight, key_bias, hidden_weight, hidden_bias, output_weight, output_bias = best
    folded = Controller(
        query_weight / spread,
        query_bias - query_weight @ centre / spread,
        key_weight / size,
        key_bias,
        hidden_weight / spread,
        hidden_bias - hidden_weight @ centre / spread,
        output_weight * length,
        output_bias * length,
    )
    return folded, best_epoch, valid_rows
