"""Hook points of the residual stream, by name."""

from difflib import get_close_matches
from functools import reduce
from typing import Any, NamedTuple

from fsteer_lens.errors import InputError, SiteError
from fsteer_lens.ground.checks import instance, is_several, several, whole
from fsteer_lens.models.classes import SteerableModel, kind_of, require_decoder
from fsteer_lens.models.plain import PlainModel


class Point(NamedTuple):
    """A place in the residual stream."""

    layer: int
    site: str

    @property
    def name(self) -> str:
        """Its name in TransformerLens."""
        return f"blocks.{self.layer}.{self.site}"


SITES = ("hook_resid_pre", "hook_resid_post")
DEFAULT_SITE = "hook_resid_post"


def layer_of(model: SteerableModel, layer: Any) -> int:
    """A layer of the model as an int; raises `SiteError` where it has no such layer."""
    try:
        return whole("layer", layer, 0, model.cfg.n_layers - 1)
    except InputError as error:
        raise SiteError(error.problem, expected=error.expected, got=error.got) from None


def layers_of(model: SteerableModel, layers: Any) -> list[int]:
    """Layers of the model as ints, one or several of them, each once; errors as in `layer_of`.

    Raises:
        InputError: no layer.
    """
    if not is_several(layers):
        return [layer_of(model, layers)]
    given = several("layer", layers, "an int or a list of ints", least=1)
    return list(dict.fromkeys(layer_of(model, layer) for layer in given))


def site_name(model: SteerableModel, layer: int, site: str = DEFAULT_SITE) -> str:
    """Name of a hook point of the residual stream, checked against the model.

    Raises:
        SiteError: no such layer, or a site that cannot be steered the same way on both model classes.
        InputError: no model that can be steered, see `require_decoder`.
    """
    require_decoder(model)
    layer = layer_of(model, layer)
    if instance("site", site, str, "text") not in SITES:
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
    point = standing(model, name)
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


def standing(model: SteerableModel, name: str) -> Any | None:
    """The hook point by its path: a Bridge makes its `hook_dict` anew at every look, which takes a millisecond."""
    if isinstance(model, PlainModel):
        return model.hook_dict.get(name)
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
