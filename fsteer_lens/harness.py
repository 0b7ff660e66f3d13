"""Steered models in EleutherAI's lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

    import lm_eval
    from fsteer_lens import harness

    results = lm_eval.simple_evaluate(harness.lm(model, steering), tasks=["arc_easy"])

The harness gives texts and takes log-probabilities and texts back; what lies between is `run.teacher_forcing` and
`run.generation`, so that a steered model is measured exactly as it runs everywhere else. Needs `lm-eval`, which
nothing else in this package imports.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fsteer_lens.errors import ContextLengthError, InputError, MissingDependencyError
from fsteer_lens.ground.checks import optional, switch, whole
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.hooks.objects import HookObject, remembered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.devices import device_of
from fsteer_lens.prompts.chat import NO_ARGUMENTS, ChatTemplate
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import require_tokenizer, text_ids
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.generation import generate
from fsteer_lens.run.stopping import Stop
from fsteer_lens.run.teacher_forcing import each_answer, known_logprobs

MAX_NEW_TOKENS = 256
"""What the harness's own models generate for a task that does not say how much."""

Pair = tuple[Any, Sequence[int], Sequence[int]]
"""A request as the harness hands it over, its context and its continuation as token ids."""


def lm(
    model: SteerableModel,
    steering: HookObject | None = None,
    *,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> "SteeredLM":
    """A model of lm-evaluation-harness (`lm_eval.api.model.LM`) that is steered.

    The query activation is read at the last token of the context, never inside a continuation. The harness moves
    spaces at the end of a context to the continuation, so that token is the last one before them.

    Where there is no context (an empty one, and every text of a perplexity task) the model reads the
    beginning-of-sequence token alone, or the end-of-sequence token where it has none, and that token is the query: a
    gate then decides the same for all of them and knows nothing of the text, and scope="prompt" edits that one
    position. Such numbers show what a steering costs that is always on, or always off; they do not test its gate. Of a
    text longer than the window, the last piece has the text before it as its context.

    A context that does not fit loses its beginning, as with the harness's own models.

    The harness's `use_cache` knows requests by their text alone: give every steering a file of its own.

    Args:
        model: a HookedTransformer or TransformerBridge, with its tokenizer.
        steering: what to put on it: a steering, an ablation or a chain; None evaluates the bare model.
        batch_size: rows per forward pass.
        max_new_tokens: tokens to generate at most, where the task does not say.
        max_length: length of the window; None is the model's context.
        add_bos_token: put the beginning-of-sequence token in front of texts that do not begin with it; None does as it
            was done when the steering was fitted, else as the tokenizer does.
        seed: of the draws, for tasks that sample.
        progress: show progress bars.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        MismatchError: the steering was fitted on texts that became tokens in another way. That it was fitted on a chat,
            and is asked for plain text, or the other way round, is found when the first request comes.
        InputError: options out of range.
        TokenizerError: the model has no tokenizer.
    """
    try:
        from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            "lm-evaluation-harness is not installed", fix='pip install "fsteer-lens[eval]"'
        ) from error
    kind = type(SteeredLM.__name__, (SteeredLM, TemplateLM), {"__doc__": SteeredLM.__doc__})
    return kind(
        model,
        steering,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        add_bos_token=add_bos_token,
        seed=seed,
        progress=progress,
    )


class SteeredLM:
    """The methods that the harness calls; `lm` makes it one of the harness's models.

    Written apart from the harness's base class, `TemplateLM`, so that it can be read and run without it. From that it
    takes `loglikelihood`, which turns texts into ids with `tok_encode`, and `chat_template`.
    """

    cache_hook: Any = None

    def __init__(
        self,
        model: SteerableModel,
        steering: HookObject | None = None,
        *,
        batch_size: int,
        max_new_tokens: int,
        max_length: int | None,
        add_bos_token: bool | None,
        seed: int,
        progress: bool,
    ) -> None:
        super().__init__()
        longest = model.cfg.n_ctx
        given = longest if max_length is None else max_length
        self.model, self.steering = model, steering
        self.tokenizer = require_tokenizer(model)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.max_gen_toks = whole("max_new_tokens", max_new_tokens, 1)
        self.max_length = whole("max_length", given, 2, longest, why="the model's context")
        self._remembered, self._templated = remembered(steering), False
        passes = Passes(prepend_bos=optional(switch, "add_bos_token", add_bos_token))
        self.add_bos_token = passes.following(self._remembered, model).prepend_bos
        self.progress = switch("progress", progress)
        self.seed = whole("seed", seed)
        self._device = device_of(model)

    def __repr__(self) -> str:
        return f"SteeredLM({type(self.model).__name__}, {self.steering})"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the configuration of its results."""
        return {"model_class": type(self.model).__name__, "steering": repr(self.steering)}

    # ------------------------------------------------------------------------------------------------ texts and ids

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the beginning-of-sequence token, else the end-of-sequence token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; None puts the beginning-of-sequence token in front as `add_bos_token` says."""
        return text_ids(
            self.tokenizer, string, self.add_bos_token if add_special_tokens is None else add_special_tokens
        )

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells apart the requests that it stores."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; where the template refuses a system message, it opens the first turn after it.

        Raises:
            TokenizerError: the tokenizer has no chat template, or one that does not take these turns.
        """
        self._templated = True
        template = ChatTemplate(self.tokenizer, self._remembered.arguments or NO_ARGUMENTS)
        return template.text(chat_history, opening=add_generation_prompt)

    def _require_format(self) -> None:
        """Raise `MismatchError` where the harness renders chats and the steering was fitted on plain text, or so."""
        self._remembered.require_match(PromptFormat(chat=self._templated))

    # ------------------------------------------------------------------------------------------------------- scoring

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding would give it, for each request.

        Raises:
            InputError: a continuation without a token.
            ContextLengthError: a continuation that does not fit into the window.
        """
        self._require_format()
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with progress_bar(len(rows), "scoring", self.progress and not disable_tqdm) as advance:
            options: Any = {"batch_size": self.batch_size, "advance": advance}
            for index, logits in each_answer(self.model, rows, self.steering, **options):
                answer = rows[index].answer
                greedy = tuple(logits.argmax(dim=-1).tolist()) == answer
                found[index] = (float(known_logprobs(logits, answer).sum()), greedy)
                if requests[index][0] is not None:
                    self._remember("loglikelihood", requests[index][0], found[index])
        return found

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> Answered:
        """A request in the window: what the model reads is all but the last token, so one more than the window fits."""
        if not len(continuation):
            raise InputError("continuation", expected="at least one token", got="none")
        if len(continuation) > self.max_length:
            raise ContextLengthError(
                "a continuation is too long", expected=f"at most {self.max_length} tokens", got=len(continuation)
            )
        whole = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return Answered(tuple(whole[: -len(continuation)]), tuple(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats, every token predicted once, in windows that do not share a prediction.

        A text is read after the prefix token, and only one of it: the harness's own models put it in front of the
        tokenizer's, and then count the second one as a token of the text.
        """
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )

        pairs: list[Pair] = []
        of_request: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            ids = ids[1:] if ids[:1] == [self.tokenizer.bos_token_id] else ids
            windows = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs += [(None, *make_disjoint_window(window)) for window in windows]
            of_request += [number] * (len(pairs) - len(of_request))
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(of_request, self._loglikelihood_tokens(pairs, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    # ---------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text for every request, up to the first of its `until` texts, which is cut off.

        The model's own ends of an answer (`tokens.stop_ids`) end a text as well. Of a task's generation arguments
        do_sample, temperature, top_k, top_p, until and max_gen_toks (by any of its names) are taken; top_k and top_p
        mean nothing without sampling.

        Raises:
            InputError: other generation arguments.
            ContextLengthError: no room for a context beside the new tokens.
        """
        self._require_format()
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            contexts = [requests[number].args[0] for number in numbers]
            made = self._generate(contexts, requests[numbers[0]].args[1], disable_tqdm)
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
                self._remember("generate_until", requests[number].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], arguments: Mapping[str, Any], disable_tqdm: bool) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

        given = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        new_tokens, do_sample = given.pop("max_gen_toks"), given.pop("do_sample")
        until = [text for text in given.pop("until") if text]
        sampling: dict[str, Any] = {name: given.pop(name, None) for name in ("temperature", "top_k", "top_p")}
        if given:
            known = "do_sample, temperature, top_k, top_p, until, max_gen_toks"
            raise InputError("generation arguments", expected=f"some of {known}", got=sorted(given))
        room = self.max_length - new_tokens
        if room < 1:
            raise ContextLengthError(
                f"{new_tokens} new tokens leave no room for a context",
                expected=f"at most {self.max_length - 1}",
                got=new_tokens,
                fix="Pass max_new_tokens=, or gen_kwargs={'max_gen_toks': ...} where the task says how many.",
            )
        made = generate(
            self.model,
            [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts],
            self.steering,
            max_new_tokens=new_tokens,
            stop=until,
            do_sample=do_sample,
            **({**sampling, "seed": self.seed} if do_sample else {}),
            batch_size=self.batch_size,
            progress=self.progress and not disable_tqdm,
        )
        texts = [self.tokenizer.decode(list(one.tokens), skip_special_tokens=True) for one in made]
        return [Stop(self.model, until).cut(text) for text in texts]

    def _remember(self, kind: str, request: Any, result: Any) -> None:
        """Tell the harness's cache, where there is one, so that an interrupted run goes on from there."""
        if self.cache_hook is not None:
            self.cache_hook.add_partial(kind, request, result)
