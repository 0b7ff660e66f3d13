"""What a client asks of an engine, and what it gets back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fsteer_lens.errors import HookError
from fsteer_lens.ground.checks import choice, finite, instance, optional
from fsteer_lens.serving.artefacts import KEY, NAME, READ, STRENGTH
from fsteer_lens.trace.trace import Trace


@dataclass(frozen=True)
class Record:
    """What was done to one request.

    Attributes:
        steering: the name that it was asked for by.
        digest: of the bytes of its file, the first half of their SHA-256.
        strength: λ of each link; None where it has none.
        scope: of each link likewise, as text.
        edited: number of tokens that something was added to, at each edited layer.
        trace: gate, weights, energy ratios: a `Trace` of one row, without what changes from token to token.
    """

    steering: str
    digest: str
    strength: tuple[float | None, ...]
    scope: tuple[str | None, ...]
    edited: Mapping[int, int]
    trace: Trace

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` reads them."""
        edited = {str(layer): n for layer, n in self.edited.items()}
        return {**vars(self), "edited": edited, "trace": self.trace.to_records()[0]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """The record that `to_json` gave, also after a way through JSON.

        Raises:
            DataError: no trace of that kind.
            KeyError: a value is missing.
        """
        return cls(
            values["steering"],
            values["digest"],
            tuple(values["strength"]),
            tuple(values["scope"]),
            {int(layer): n for layer, n in values["edited"].items()},
            Trace.from_records([values["trace"]]),
        )


def arguments(
    steering: str,
    *,
    strength: float | None = None,
    read: Literal["live", "clean"] | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """What a request has to carry: `SamplingParams(extra_args=arguments("refusal"))`, or over HTTP
    `"vllm_xargs": arguments("refusal")` in the body.

    Args:
        steering: name of the file without its ending.
        strength: λ in place of the steering's own.
        read: "live" for a steering at several layers, whose later ones then see what earlier ones have added.
        key: what the record can be asked for by afterwards, of a stream, which brings none.

    Raises:
        InputError: a value of another kind.
    """
    given = {
        NAME: instance("steering", steering, str, "the name of a steering"),
        STRENGTH: optional(finite, "strength", strength),
        READ: optional(choice, "read", read, ("live", "clean")),
        KEY: optional(instance, "key", key, str, "a text"),
    }
    return {name: value for name, value in given.items() if value is not None}


def record_of(answer: Any) -> Record:
    """The record in an answer: a vLLM `RequestOutput`, or the body of an HTTP answer as a mapping.

    Of several samples (n > 1) it is that of the last one to end; they share the prompt and so the decision.

    Raises:
        HookError: there is none, so that nobody knows whether the answer was steered: vLLM ignores arguments of
            plugins that it does not have.
    """
    held = (
        answer.get("kv_transfer_params") if isinstance(answer, Mapping) else getattr(answer, "kv_transfer_params", None)
    )
    values = (held or {}).get(NAME)
    if values is None:
        raise HookError(
            "this answer has no record of a steering",
            expected="an answer to a request that named one, of an engine that has the plugin",
            got="none",
            fix="Set FSTEER_STEERINGS and --worker-cls fsteer_lens.serving.Worker, and send arguments(...).",
        )
    if "error" in values:
        raise HookError(f"steering {values[NAME]!r} failed", got=values["error"])
    return Record.from_json(values)
