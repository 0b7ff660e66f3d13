"""Products of a query's leading coordinates: what a residual that is quadratic in the query is regressed on.

Let z = P (h/‖h‖ − mean) be the q principal coordinates of queries brought to length 1, as the normalisation before the
next block sees them; they are bounded, and so are their products, whatever the query. β gains zᵀ Q z for each of its
coefficients. For the regression the q(q+1)/2 different products stand side by side, those of two coordinates times √2:
then their inner products are (z·z′)².
"""

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.ridge import Spectrum

COORDINATES: Final = 32
SHARE: Final = 1.0
"""Mean squared length of the products, in that of the queries beside which they stand."""


class View(NamedTuple):
    """z = h/‖h‖ · weight + bias, [d q] and [q]."""

    weight: Float[Tensor, "d q"]
    bias: Float[Tensor, " q"]

    def __call__(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        """The products of every row."""
        z = F.normalize(h, dim=1) @ self.weight + self.bias
        first, second, scale = _pairs(self.weight)
        return z[:, first] * z[:, second] * scale

    def without(self) -> "View":
        """A view of no coordinates."""
        return View(self.weight[:, :0], self.bias[:0])


def view_of(h: Float[Tensor, "n d"], size: float) -> View:
    """The leading coordinates, scaled so that the products have `SHARE` times the mean squared length `size`."""
    unit = F.normalize(h, dim=1)
    directions = Spectrum.of(unit).basis[:, -COORDINATES:]
    centred = (unit - unit.mean(dim=0)) @ directions
    fourth = float(centred.square().sum(dim=1).square().mean())
    weight = directions * (SHARE * size / fourth) ** 0.25 if fourth > 0 else directions[:, :0]
    return View(weight, -unit.mean(dim=0) @ weight)


def forms_of(view: View, weight: Float[Tensor, "p m"]) -> tuple[View, Float[Tensor, "m q q"]]:
    """The view, and the symmetric Q of every coefficient whose zᵀ Q z is the products times `weight`."""
    first, second, scale = _pairs(view.weight)
    q = len(view.bias)
    forms = weight.new_zeros(weight.shape[1], q, q)
    half = (weight * scale.unsqueeze(1) / 2).T
    forms[:, first, second] += half
    forms[:, second, first] += half
    return view, forms


def _pairs(weight: Float[Tensor, "d q"]) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of both coordinates of each product, and its scale."""
    q = weight.shape[1]
    first, second = torch.triu_indices(q, q, device=weight.device)
    return first, second, torch.where(first == second, 1.0, 2.0).to(weight).sqrt()
