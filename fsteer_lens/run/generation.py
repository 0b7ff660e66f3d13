"""`generate` and `stream`: steered text with the trace of how it came about.

1. Prompts are tokenised, sorted by length and padded on the left.
2. One decoding loop serves both model classes; the hooks are on the model only while it computes a token.
3. A recorder keeps a few numbers of every step. With `compare=True` the unsteered model is fed the steered tokens
   alongside, and the same prompts are generated without steering.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, overload

import torch

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import require_unset, switch, whole
from fsteer_lens.hooks.objects import HookObject, remembered
from fsteer_lens.hooks.opening import Read, open_session
from fsteer_lens.hooks.session import Session
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompt, GivenPrompts, Prompt, as_prompt, one_or_more
from fsteer_lens.prompts.passes import FormatOptions, Passes
from fsteer_lens.prompts.tokens import (
    Batch,
    Detokenizer,
    pad,
    require_fits,
    require_tokenizer,
    texts_of_top,
    token_texts,
)
from fsteer_lens.prompts.windows import Asked
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.decoding import Rules, Step, decode
from fsteer_lens.run.recorder import Recorder, filled, predicted, without_fill
from fsteer_lens.run.replaying import MOST_PROMPTS, MOST_TOKENS, replay_of
from fsteer_lens.run.sampling import Sampling, SamplingOptions
from fsteer_lens.run.stopping import Stop
from fsteer_lens.run.unsteered import Unsteered
from fsteer_lens.trace.steps import Steps
from fsteer_lens.trace.trace import Trace, join


@dataclass(frozen=True)
class Baseline:
    """What the model generates for a prompt without steering."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Generation:
    """One prompt's generated text.

    Attributes:
        prompt: as it was given.
        text: generated text without special tokens.
        tokens: generated ids, with the one that ended the answer.
        trace: what steering did, a `Trace` of one row.
        baseline: the unsteered run, with `compare=True`.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    trace: Trace
    baseline: Baseline | None = None

    def __repr__(self) -> str:
        return f"Generation({self.text[:60]!r}, {len(self.tokens)} tokens)"


class Generations(Sequence[Generation]):
    """Generated texts, one per prompt, in the order of the prompts."""

    def __init__(self, items: Iterable[Generation]) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> "Generations": ...
    def __getitem__(self, index: int | slice) -> "Generation | Generations":
        return Generations(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __repr__(self) -> str:
        return f"Generations({len(self)} texts)"

    @property
    def texts(self) -> list[str]:
        """The generated texts."""
        return [item.text for item in self]

    @property
    def trace(self) -> Trace:
        """One trace with all rows."""
        return join([item.trace for item in self])


@dataclass(frozen=True)
class StepRecord:
    """One generated token as `stream` yields it.

    Attributes:
        step: 0 for the first generated token.
        token: its id.
        logprob: its log-probability under the steered model's raw logits, in nats.
        top: the most probable tokens with their log-probabilities.
        gate: gate value at every steered layer: the prompt's, or with refresh="step" this step's.
        change: ‖edit‖ / ‖residual stream‖ at the position that predicted this token, at every steered layer.
        parts: (gate, change) of each link, of a chain.
    """

    step: int
    token: int
    logprob: float
    top: tuple[tuple[str, float], ...]
    gate: Mapping[int, float]
    change: Mapping[int, float]
    parts: tuple[tuple[Mapping[int, float], Mapping[int, float]], ...] = ()


class StreamOptions(SamplingOptions, FormatOptions, total=False):
    """What `stream` takes by name beside its own arguments."""


def generate(
    model: SteerableModel,
    prompts: GivenPrompt | GivenPrompts,
    steering: HookObject | None = None,
    *,
    max_new_tokens: int = 64,
    stop: Sequence[int | str] | None = None,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prepend_bos: bool | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    batch_size: int = 16,
    compare: bool = False,
    replay: bool = False,
    read: Read | None = None,
    use_past_kv_cache: bool = True,
    progress: bool = True,
) -> Generations:
    """Generate text, steered, with a trace of what steering did to every row, layer and token.

    Where a gate scans (`evaluation.fit_scan`) the windows of every prompt are run before it, up to the gate's layer;
    prompts then are text or messages, since nobody can tell what a person said in token ids.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: one prompt, or several of them in a list, an array, a column of a table or a generator; see
            `tokens.prompt_ids` for how they become tokens.
        steering: what to put on the model: a steering, a probe, an ablation or a chain; None generates without.
        max_new_tokens: tokens to generate at most.
        stop: token ids and texts that end an answer as well, beside the model's end-of-sequence ids and the chat
            template's end of turn, which always do.
        chat: send string prompts as the user's turn through the chat template, or not; None: as the steering was
            fitted, else not. A chat whose last message is the assistant's is continued there.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": False}` or `tools`;
            None: as the steering was fitted.
        prepend_bos: put a beginning-of-sequence token in front of plain strings; None: as the steering was fitted, else
            as the tokenizer does.
        do_sample, temperature, top_k, top_p, seed: draw tokens instead of taking the most probable one. Each prompt
            draws from a generator of its own, so that batching does not change the draws.
        batch_size: rows per forward pass; with `compare=True` keys and values of both runs are held at once.
        compare: also run without steering: `baseline` of each generation, and per token KL(steered ‖ unsteered) and
            the unsteered log-probabilities in `trace.steps`, from one pass of the steered text through the
            unsteered model. Unsteered is without any hook of this package; hooks of others stay on.
        replay: with `compare=True`, also record what `figures.replay` draws, from two passes over each whole text and
            some tokens of the unsteered model more: `trace.replay`. For at most 8 prompts and 256 new tokens.
        read: where the query activations come from where there are several layers: "clean", one unsteered pass over the
            prompt, or "live", the running stream, in which later layers see what earlier ones have added. None is
            "clean", but "live" with refresh="step".
        use_past_kv_cache: False runs the whole text again for every token; the same tokens, slower.
        progress: show a progress bar.

    Raises:
        InputError: no prompts, options that contradict each other or have no effect.
        ContextLengthError: a prompt with its new tokens does not fit into the context.
        MismatchError: the steering was fitted on another model, or on prompts that became tokens in another way.
        TokenizerError: the chat template does not take these turns, or drops what was said.
        NonFiniteError: the model's numbers blow up; names the step and the row.
        HookError: the steering's hooks do not run.
    """
    many = one_or_more(prompts)
    passes = Passes(chat, batch_size, progress, chat_template_kwargs, prepend_bos)
    passes = passes.following(remembered(steering), model, many)
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    if switch("compare", compare) and steering is None:
        raise InputError("compare=True without a steering has nothing to compare", fix="Give steering=.")
    if steering is None:
        require_unset("no steering", read=read)
    if switch("replay", replay):
        _require_replayable(compare, len(many), max_new_tokens)
    sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
    rules = Rules(sampling, Stop(model, stop), max_new_tokens, switch("use_past_kv_cache", use_past_kv_cache))
    told = passes.tokenisation(model)
    rows = [told.ids(prompt) for prompt in many]
    for number, row in enumerate(rows):
        require_fits(model, len(row) + max_new_tokens, f"prompt {number} with {max_new_tokens} new tokens")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    results: dict[int, Generation] = {}
    with passes.bar(len(rows), "generating") as advance:
        for start in range(0, len(order), passes.batch_size):
            chosen = order[start : start + passes.batch_size]
            asked, ids = [Asked(many[index], told) for index in chosen], [rows[index] for index in chosen]
            made = _generate_batch(model, asked, ids, chosen, steering, rules, read, compare, replay)
            results |= zip(chosen, made, strict=True)
            advance(len(chosen))
    return Generations(results[index] for index in range(len(rows)))


def _require_replayable(compare: bool, n_prompts: int, max_new_tokens: int) -> None:
    if not compare:
        raise InputError("replay=True without compare=True", fix="Give compare=True: a replay shows both runs.")
    for name, given, most in (("prompts", n_prompts, MOST_PROMPTS), ("new tokens", max_new_tokens, MOST_TOKENS)):
        if given > most:
            raise InputError(f"{name} of a replay", expected=f"at most {most}", got=given)


def stream(
    model: SteerableModel,
    prompt: GivenPrompt,
    steering: HookObject | None = None,
    *,
    max_new_tokens: int = 64,
    stop: Sequence[int | str] | None = None,
    read: Read | None = None,
    use_past_kv_cache: bool = True,
    **options: Unpack[StreamOptions],
) -> Iterator[tuple[str, StepRecord]]:
    """Generate one text token by token, yielding (text that the token adds, step record); the tokens of `generate`.

    Arguments and errors as in `generate`; `options` are chat, chat_template_kwargs and prepend_bos, and do_sample,
    temperature, top_k, top_p and seed. The hooks are on the model only while it computes a token.
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    if steering is None:
        require_unset("no steering", read=read)
    given: dict[str, Any] = dict(options)
    passes = Passes(**{name: given.pop(name) for name in FormatOptions.__annotations__ if name in given})
    drawing = Sampling.of(given)
    asked = as_prompt(prompt)
    told = passes.following(remembered(steering), model, [asked]).tokenisation(model)
    ids = told.ids(asked)
    require_fits(model, len(ids) + max_new_tokens, f"the prompt with {max_new_tokens} new tokens")
    batch = pad(model, [ids], "left")
    session = _session(model, batch, steering, read, [Asked(asked, told)])
    cached = switch("use_past_kv_cache", use_past_kv_cache)
    steps = decode(model, batch, session, Rules(drawing, Stop(model, stop), max_new_tokens, cached), [0])
    return _records(steps, require_tokenizer(model), ids, Trace() if session is None else session.trace)


def _records(steps: Iterator[Step], tokenizer: Any, ids: list[int], trace: Trace) -> Iterator[tuple[str, StepRecord]]:
    detokenize = Detokenizer(tokenizer, ids)
    for number, step in enumerate(steps):
        said = predicted(step.logprobs, step.chosen)
        token = int(step.chosen[0])
        ((texts,),) = texts_of_top(tokenizer, said.top_ids.unsqueeze(1))
        top = tuple(zip(texts, said.top_logprobs[0].tolist(), strict=True))
        parts = tuple(_latest(part) for part in trace.parts)
        record = StepRecord(number, token, float(said.logprobs[0]), top, *_latest(trace), parts=parts)
        yield detokenize(token), record


def _latest(trace: Trace) -> tuple[dict[int, float], dict[int, float]]:
    """Gate and change at the latest position of a trace with one row, per layer."""
    gate = {layer: float(value[0]) for layer, value in trace.gate.items()}
    gate |= {layer: float(value[0, -1]) for layer, value in trace.step_gate.items()}
    return gate, {layer: float(value[0, -1]) for layer, value in trace.change.items()}


def _session(
    model: SteerableModel, batch: Batch, steering: HookObject | None, read: Read | None, asked: Sequence[Asked]
) -> Session | None:
    """A session for left-padded prompts; None where there is nothing to put on the model."""
    return None if steering is None else open_session(model, batch, steering, batch.mask.sum(dim=1), read, asked)


def _generate_batch(
    model: SteerableModel,
    asked: Sequence[Asked],
    ids: Sequence[Sequence[int]],
    numbers: Sequence[int],
    steering: HookObject | None,
    rules: Rules,
    read: Read | None,
    compare: bool,
    replay: bool,
) -> list[Generation]:
    """Go on with one batch of prompts, whose places among all of them are `numbers`."""
    batch = pad(model, ids, "left")
    session = _session(model, batch, steering, read, asked)
    recorder = Recorder(model, ids)
    steps = decode(model, batch, session, rules, numbers)
    compared = Unsteered(model, batch, cache=rules.cache).beside(steps) if compare else ((step, None) for step in steps)
    for step, base in compared:
        recorder.add(step, base)
    trace = recorder.complete(Trace() if session is None else session.trace)
    trace.prompt_lengths = batch.mask.sum(dim=1).cpu()
    trace.first = batch.tokens.shape[1] - trace.prompt_lengths
    assert trace.steps is not None
    baselines: Sequence[Baseline | None] = [None] * len(ids)
    if compare:
        baselines = _baselines(model, ids, numbers, rules, trace.steps)
        rows = zip(baselines, ids, strict=True)
        trace.unsteered = tuple(token_texts(model, one.tokens, before) for one, before in rows)
    answers = without_fill(trace.steps.tokens)
    texts = [_answer(model, *pair, rules.stop) for pair in zip(ids, answers, strict=True)]
    if replay:
        assert steering is not None
        texts_of = [Answered(tuple(row), answer, one) for row, answer, one in zip(ids, answers, asked, strict=True)]
        steps_of = [trace.steps.row(index) for index in range(len(ids))]
        pairs = zip(texts_of, steps_of, strict=True)
        trace.replay = tuple(replay_of(model, *pair, steering, read, rules.stop) for pair in pairs)
    traces = [trace.row(index) for index in range(len(ids))]
    prompts = [one.prompt for one in asked]
    return [Generation(*one) for one in zip(prompts, texts, answers, traces, baselines, strict=True)]


def _baselines(
    model: SteerableModel, ids: Sequence[Sequence[int]], numbers: Sequence[int], rules: Rules, steps: Steps
) -> list[Baseline]:
    """What the unsteered model generates for the same prompts, whose steered steps were compared.

    Greedily it says the same where it found the steered token the likeliest at every step: that is not run again.
    """
    assert steps.baseline_top_ids is not None
    answers = without_fill(steps.tokens)
    alike = (steps.baseline_top_ids[:, :, 0] == steps.tokens).all(dim=1).tolist()
    others = [row for row in range(len(ids)) if rules.sampling.do_sample or not alike[row]]
    if others:
        batch = pad(model, [ids[row] for row in others], "left")
        with unsteered(model):
            made = decode(model, batch, None, rules, [numbers[row] for row in others])
            tokens = torch.stack([filled(step.chosen, step.alive) for step in made], dim=1)
        for row, answer in zip(others, without_fill(tokens), strict=True):
            answers[row] = answer
    return [Baseline(_answer(model, *pair, rules.stop), pair[1]) for pair in zip(ids, answers, strict=True)]


def _answer(model: SteerableModel, prompt: Sequence[int], generated: Sequence[int], stop: Stop) -> str:
    """Generated text without special tokens, up to a stop text, with the spacing that it has after its prompt."""
    tokenizer = require_tokenizer(model)
    before, after = (
        tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (prompt, [*prompt, *generated])
    )
    return stop.cut(after[len(before) :])
