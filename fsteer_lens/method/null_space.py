"""A gate that is a map: 0 on what general queries span, 1 on queries that need steering; it scales the vector.

AlphaSteer (Sheng et al. 2025, arXiv 2506.07022) makes its whole steering vector linear in the query and zero on general
queries. Here the vector stays what it is, that of the experts or a mean shift, and a number takes the place of the map:

    m(h) = clamp(w·h + b, 0, 1)

It leaves alone what it was shown, and nothing else: so it knows, for each domain of general queries, what would be left
of the steering there, and what would be left had that domain not been shown.
"""

from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.ground.checks import clean_text, finite, instance, normalised, optional, several, whole
from fsteer_lens.ground.tables import markdown
from fsteer_lens.method.gates import Gate, Reading, require_reading
from fsteer_lens.method.linalg import require_shapes, require_width


@dataclass(frozen=True)
class DomainShare:
    """How much of the steering is left on one domain of general queries, on queries that the map was not fitted to.

    Attributes:
        name: of the domain.
        n: how many of its queries there are.
        share: mean of m over them, in [0, 1].
        left_out: the same of a map that was fitted without the domain: what another domain, that nobody thought of,
            may get. None where there is no other domain to fit to.
    """

    name: str
    n: int
    share: float
    left_out: float | None = None

    def __post_init__(self) -> None:
        normalised(
            self,
            name=clean_text("domain name", self.name),
            n=whole("domain n", self.n, 1),
            share=_share("domain share", self.share),
            left_out=optional(_share, "domain left_out", self.left_out),
        )


@final
@dataclass(frozen=True, eq=False, repr=False)
class NullSpaceGate(Gate):
    """m(h) = clamp(w·h + b, 0, 1): next to 0 on general queries, next to 1 on those that need steering.

    Attributes:
        weight: w, [d].
        bias: b.
        layer: where it reads.
        read: what it reads of a prompt.
        kept: mean of m over queries that need steering, on queries that the map was not fitted to; None is unknown.
        domains: what is left on each domain of general queries.
    """

    weight: Float[Tensor, " d"]
    bias: float
    layer: int | None = None
    read: Reading = "last"
    kept: float | None = None
    domains: tuple[DomainShare, ...] = ()

    def __post_init__(self) -> None:
        require_reading(self.read)
        require_shapes("null space gate", weight=(self.weight, "d"))
        domains = several("null space gate domains", self.domains, "a DomainShare for each domain")
        for one in domains:
            instance("null space gate domains", one, DomainShare, "a DomainShare")
        normalised(
            self,
            bias=finite("null space gate bias", self.bias),
            layer=optional(whole, "null space gate layer", self.layer, 0),
            kept=optional(_share, "null space gate kept", self.kept),
            domains=tuple(domains),
        )

    def __repr__(self) -> str:
        told = [f"d_model={self.d_model}"] + ([] if self.kept is None else [f"kept={self.kept:.2f}"])
        told += [f"{_shown(one.name)}={one.share:.2f} (left out {_number(one.left_out)})" for one in self.domains]
        return f"NullSpaceGate({', '.join(told)})"

    def to_markdown(self) -> str:
        """What is left of the steering, domain by domain, as a table."""
        rows = [[_shown(one.name), str(one.n), f"{one.share:.3f}", _number(one.left_out, 3)] for one in self.domains]
        return markdown(["domain", "queries", "left of the steering", "had it been left out"], rows)

    @property
    def d_model(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the activations."""
        return len(self.weight)

    @property
    def score_name(self) -> str:
        """The map before it is cut off."""
        return "map w·h + b (general 0, to be steered 1)"

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """w·h + b, which is not cut off at 0 and 1."""
        require_width(h, "activation", self.d_model)
        return h.to(self.weight) @ self.weight + self.bias

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """clamp(w·h + b, 0, 1)."""
        return self.score(h).clamp(0, 1)


def _share(name: str, value: Any) -> float:
    return finite(name, value, least=0, most=1)


def _shown(name: str) -> str:
    """A name as it may reach a terminal: one out of a file may hold escape sequences and line breaks."""
    return repr(name)[1:-1]


def _number(value: float | None, digits: int = 2) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"
