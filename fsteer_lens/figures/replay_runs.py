"""What a replay shows of one generated text, as plain values: every token with what happened there, in words too."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.likeliest import likeliest
from fsteer_lens.figures.style import capital, expert_names, one_line
from fsteer_lens.method.experts import mentioned
from fsteer_lens.method.gates import SHUT
from fsteer_lens.trace.replay import Replay, Scored
from fsteer_lens.trace.steps import Steps
from fsteer_lens.trace.trace import Trace

FLOOR: Final = 1e-5
"""The smallest probability that is drawn, as in replay.js."""
SMALL: Final = 0.005
"""A share of the stream that is told as nothing."""


class Candidate(NamedTuple):
    """A token that was likely in one run or in both, with its probabilities: None is not among the likeliest."""

    token: int
    text: str
    unsteered: float | None
    steered: float | None


@dataclass(frozen=True, eq=False)
class Run:
    """One text to be watched; P prompt tokens, n generated ones, s = P + n − 1 positions.

    Attributes:
        title: what to call it.
        prompt, answer: texts of its tokens.
        steps: what was said and what else was likely.
        record: the replay.
        unsteered: what the model says without steering, as tokens.
        layer: whose gate and experts are shown: the first edited one.
        gate: how far its gate opened, at every position, [s]; None where nothing is gated.
        weights: of its experts, at every position, [s k]; None where there are none.
        change: ‖edit‖ / ‖stream‖ at every position of that layer, [s].
        names: of the experts.
    """

    title: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    steps: Steps
    record: Replay
    unsteered: tuple[str, ...]
    layer: int | None
    gate: Tensor | None
    weights: Tensor | None
    change: Tensor
    names: tuple[str, ...]

    @property
    def n_positions(self) -> int:
        """s, the positions that the model read."""
        return self.record.size.shape[1]

    @property
    def score(self) -> Scored | None:
        """The score of the gate that decided; None where there was none."""
        own = [one for one in self.record.scores if one.layer == self.layer]
        return next(iter(own or self.record.scores), None)

    @property
    def score_name(self) -> str:
        """What the score is, in few words."""
        assert self.score is not None
        return self.score.name.split(" (")[0]

    @property
    def kl(self) -> list[float]:
        """KL(steered ‖ unsteered) of every generated token, in nats."""
        assert self.steps.kl is not None
        return self.steps.kl[0].nan_to_num(0).tolist()

    def added(self, position: int) -> list[float]:
        """Of every expert weight × gate at a position, 0 where nothing is added."""
        if self.weights is None:
            return []
        opened = 1.0 if self.gate is None else float(self.gate[position])
        acting = opened if float(self.change[position]) > 0 else 0.0
        return (self.weights[position].nan_to_num(0) * acting).tolist()

    def candidates(self, step: int) -> list[Candidate]:
        """Likely tokens at a step, with the one that was said."""
        sides = [{one.token: one for one in likeliest(self.steps, side, step)} for side in ("baseline_top", "top")]
        said = int(self.steps.tokens[0, step])
        assert self.steps.baseline_logprobs is not None
        own = [float(self.steps.baseline_logprobs[0, step]), float(self.steps.logprobs[0, step])]
        found = []
        for token in dict.fromkeys([*sides[0], *sides[1], said]):
            ones = [side.get(token) for side in sides]
            if token == said:
                found.append(Candidate(token, self.answer[step], *map(math.exp, own)))
            else:
                text = next(one.text for one in ones if one is not None)
                found.append(Candidate(token, text, *(None if one is None else math.exp(one.logprob) for one in ones)))
        return found

    def unsteered_here(self, step: int) -> str | None:
        """What the unsteered model would say at a step; None where that is the same."""
        best = likeliest(self.steps, "baseline_top", step)[0]
        return None if best.token == int(self.steps.tokens[0, step]) else best.text

    def headline(self) -> str:
        """What happened, in one sentence."""
        said = [step for step in range(len(self.answer)) if self.unsteered_here(step) is not None]
        if not bool((self.change > 0).any()):
            return f"Nothing was added: {self._decision()}." if self.score else "Nothing was added."
        if not said:
            return "Something was added, and every word is the one that the unsteered model would say."
        first = said[0]
        turn = f"“{shown(self.answer[first])}” in place of “{shown(self.unsteered_here(first) or '')}”"
        rest = len(said) - 1
        after = "the rest follows by itself" if not rest else f"{rest} later {'word' if rest == 1 else 'words'} as well"
        return f"Steering turns token {first + 1}: {turn}; {after}."

    def sentence(self, column: int) -> str:
        """What happened at a token, of the prompt or of the answer, in words."""
        step = column - len(self.prompt)
        position = column if step < 0 else column - 1
        parts = []
        if step < 0:
            parts.append(f"Prompt token {column + 1} of {len(self.prompt)}.")
        else:
            parts.append(f"Token {step + 1} of {len(self.answer)}, predicted at “{self.text(position)}”.")
        score = self.score
        if score is not None and position == score.position:
            parts.append(f"{self._decision()[0].upper()}{self._decision()[1:]}.")
        parts.append(self._push(position))
        if step >= 0:
            parts.append(self._words(step))
        return " ".join(parts)

    def text(self, column: int) -> str:
        """A token as it is shown."""
        return shown((*self.prompt, *self.answer)[column])

    def _decision(self) -> str:
        """What the gate decided on the prompt."""
        score = self.score
        assert score is not None
        value, threshold = float(score.score[score.position]), score.threshold
        opened = 1.0 if self.gate is None else float(self.gate[score.position])
        state = "open" if opened > 1 - SHUT else "shut" if opened < SHUT else f"open by {opened:.2f}"
        sign = "≥" if value >= threshold else "<"
        return f"{self.score_name} is {value:.2f} {sign} {threshold:.2f}: gate {state}"

    def _push(self, position: int) -> str:
        """What is added at a position."""
        size = float(self.change[position])
        opened = 1.0 if self.gate is None else float(self.gate[position])
        if size < SMALL:
            if self.weights is not None and opened < SHUT:
                best = int(self.weights[position].nan_to_num(0).argmax())
                return f"Nothing is added (it would route to {mentioned(best, self.names)})."
            return "Nothing is added here."
        if self.weights is None:
            return f"The stream is pushed by {size:.2f} of its length."
        weights = self.weights[position].nan_to_num(0)
        best = int(weights.argmax())
        name = capital(mentioned(best, self.names))
        return f"{name} ({float(weights[best]):.2f}) pushes the stream by {size:.2f} of its length."

    def _words(self, step: int) -> str:
        """What either model says."""
        said = next(one for one in self.candidates(step) if one.token == int(self.steps.tokens[0, step]))
        word, before, after = f"“{shown(said.text)}”", percent(said.unsteered), percent(said.steered)
        other = likeliest(self.steps, "baseline_top", step)[0]
        if other.token == said.token:
            return f"Both say {word}: {before} unsteered, {after} steered."
        best = f"“{shown(other.text)}” ({percent(math.exp(other.logprob))})"
        return f"Unsteered, the model would say {best}; steered it says {word} ({after}, unsteered {before})."


def run_of(trace: Trace, title: str, names: Sequence[str] | None) -> Run:
    """What is shown of a trace of one row."""
    steps = trace.steps
    if trace.replay is None or trace.prompts is None or steps is None or trace.unsteered is None:
        raise InputError(repr(trace), got="no replay", fix="Generate with compare=True and replay=True.")
    (record,), n = trace.replay, trace.replay[0].size.shape[1]
    link = next((one for one in trace.parts or (trace,) if one.gate), trace)
    layer = next((at for at in record.edited if at in link.change), None)
    change = (
        torch.zeros(n, dtype=torch.float32, device="cpu") if layer is None else link.change[layer][0, :n].nan_to_num(0)
    )
    gate = _along(link.gate, link.step_gate, layer, n)
    weights = _along(link.weights, link.step_weights, layer, n)
    own = None if layer is None else link.names.get(layer)
    told = () if weights is None else tuple(expert_names(weights.shape[-1], names, own))
    return Run(
        title=title,
        prompt=trace.prompts[0],
        answer=steps.texts[0],
        steps=steps,
        record=record,
        unsteered=trace.unsteered[0],
        layer=layer,
        gate=gate,
        weights=weights,
        change=change,
        names=told,
    )


def _along(decided: dict[int, Tensor], anew: dict[int, Tensor], layer: int | None, n: int) -> Tensor | None:
    """A decision at every position: the prompt's, or what was decided there anew."""
    if layer is None or layer not in decided:
        return None
    value = decided[layer][0]
    spread = value.expand(n, *value.shape).clone()
    if layer in anew:
        known = anew[layer][0, :n]
        spread = torch.where(known.isnan(), spread, known)
    return spread


def shown(token: str) -> str:
    """A token on one line, with something to see where it is empty or blank."""
    text = one_line(token).replace("\t", "⇥")
    return text.strip() or ("␣" if text else "·")


def percent(chance: float | None) -> str:
    """A probability with two digits."""
    if chance is None:
        return "unknown"
    share = 100 * chance
    return f"{share:.0f} %" if share >= 9.5 else f"{share:.2g} %" if share >= 0.01 else "< 0.01 %"


def payload(run: Run, *, quantised: bool = False) -> dict[str, Any]:
    """What the page's script draws: numbers, and texts that are not yet escaped.

    Sizes and lens, nearly all of the numbers, may be quantised: 256 levels each, sizes between 0 and the largest,
    probabilities on the logarithmic axis that they are drawn on, as bytes in base64.
    """
    record = run.record
    n_prompt, n = len(run.prompt), len(run.answer)
    sizes: Any = [[_number(value) for value in column] for column in record.size.T.tolist()]
    lens: Any = [[[[_number(x) for x in row] for row in side] for side in word] for word in record.lens.tolist()]
    if quantised:
        most = float(record.size.nan_to_num(0).max()) or 1.0
        chances = record.lens.nan_to_num(0).clamp(FLOOR, 1)
        sizes = {"shape": list(record.size.T.shape), "most": most, "levels": _levels(record.size.T / most)}
        lens = {"shape": list(record.lens.shape), "levels": _levels(chances.log10() / math.log10(FLOOR))}
    return {
        "prompt": n_prompt,
        "texts": [run.text(column) for column in range(n_prompt + n)],
        "say": [run.sentence(column) for column in range(n_prompt + n)],
        "candidates": [
            [[shown(one.text), _number(one.unsteered), _number(one.steered)] for one in run.candidates(step)]
            for step in range(n)
        ],
        "displaced": [shown(text) for text in record.displaced],
        "lens": lens,
        "layers": list(record.layers),
        "edited": list(record.edited),
        "size": sizes,
        "names": list(run.names),
        "weights": [] if run.weights is None else [[_number(x, 2) for x in row] for row in run.weights.tolist()],
        "added": [[_number(x, 2) for x in run.added(position)] for position in range(run.n_positions)],
        "released": {str(step): "".join(texts) for step, texts in record.released.items()},
        "answer": list(run.answer),
    }


def _levels(shares: Tensor) -> str:
    """Shares from 0 to 1 as bytes, in base64."""
    levels = (255 * shares.nan_to_num(0).clamp(0, 1)).round().to(torch.uint8)
    return base64.b64encode(levels.contiguous().numpy().tobytes()).decode()


def _number(value: float | None, digits: int = 3) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
