"""`watch`: a generation to be watched while it is made, and gone through token by token afterwards, for Jupyter."""

from threading import Event, Thread
from typing import Any, Unpack

from fsteer_lens import figures
from fsteer_lens.effects.answers import passes_of
from fsteer_lens.errors import InputError
from fsteer_lens.explorer.messages import kind_of, text_of
from fsteer_lens.explorer.pictured import shown
from fsteer_lens.explorer.widget import WATCH, in_words, make_widget, tell
from fsteer_lens.figures import Html
from fsteer_lens.ground.checks import finite, instance, whole
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompt, as_prompt, prompt_text
from fsteer_lens.prompts.passes import FormatOptions
from fsteer_lens.run.generation import Generation, generate, stream
from fsteer_lens.run.replaying import MOST_TOKENS
from fsteer_lens.steering.steering import FineSteer

MOST_STRENGTH = 4.0
"""End of the slider, where the steering's own strength is no larger."""


class Watch:
    """A generation to be watched; shows itself in Jupyter. `watch` makes one.

    Attributes:
        made: the latest generation, with its trace and its replay.
        error: what the latest generation failed on, None where it did not; the widget shows it as text.
    """

    def __init__(
        self,
        steering: FineSteer,
        model: SteerableModel,
        prompt: GivenPrompt,
        *,
        max_new_tokens: int,
        formatting: FormatOptions,
    ) -> None:
        self._steering, self._model, self._formatting = steering, model, formatting
        self._max_new_tokens, self._stopped = max_new_tokens, Event()
        self._thread: Thread | None = None
        self.error: BaseException | None = None
        self._widget: Any = None
        self.made: Generation = self.generate(prompt)
        gates = [steering.gate_at(layer) for layer in steering.layers]
        ranks = min((gate.ranks for gate in gates if gate is not None), default=0)
        start = {
            "prompt": shown(prompt_text(as_prompt(prompt))),
            "strength": steering.strength,
            "most": max(MOST_STRENGTH, steering.strength),
            "rank": next((getattr(gate, "rank", 0) for gate in gates if gate is not None), 0) if ranks else 0,
            "ranks": ranks,
        }
        self._widget = make_widget(WATCH, start=start, view=self.view.body, live={"status": "done"})
        if self._widget is not None:
            self._widget.on_msg(self._take_message)

    def __repr__(self) -> str:
        return f"Watch({self.made!r})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        plain = {"text/plain": repr(self), "text/html": self.view.body}
        if self._widget is None:
            return plain
        bundle = self._widget._repr_mimebundle_(**options)
        told, more = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**plain, **(told or {})}, more

    @property
    def view(self) -> Html:
        """The latest generation as `figures.replay` draws it, which stays when the kernel is gone."""
        return figures.replay(self.made, titles=[prompt_text(as_prompt(self.made.prompt))])

    @property
    def widget(self) -> Any | None:
        """The anywidget behind it; None where anywidget is not installed."""
        return self._widget

    def generate(self, prompt: GivenPrompt, *, strength: float | None = None, rank: int | None = None) -> Generation:
        """Generate and show it, token by token as they come, then with its replay.

        Args:
            prompt: one prompt.
            strength: of the steering; None is its own.
            rank: of its gates; None is their own.

        Raises:
            InputError: a strength or a rank out of range.
            ContextLengthError, MismatchError: as in `fsteer_lens.generate`.
        """
        steering = self._steering
        if strength is not None:
            steering = steering.with_strength(finite("strength", strength))
        if rank is not None:
            steering = steering.at_rank(rank)
        self._stopped.clear()
        text, n_tokens = "", 0
        told = {"max_new_tokens": self._max_new_tokens, **self._formatting}
        for piece, _ in stream(self._model, prompt, steering, **told):
            text, n_tokens = text + piece, n_tokens + 1
            tell(self._widget, live={"status": "running", "text": shown(text)})
            if self._stopped.is_set():
                break
        told |= {"max_new_tokens": n_tokens, "compare": True, "replay": True, "progress": False}
        self.made = generate(self._model, prompt, steering, **told)[0]
        tell(self._widget, view=self.view.body, live={"status": "done", "text": shown(text)})
        return self.made

    def stop(self) -> None:
        """End the generation that is running after its next token."""
        self._stopped.set()

    def _take_message(self, _: Any, message: Any, buffers: Any) -> None:
        """Do what the browser asks for; it goes on in a thread, so that the kernel can hear "stop"."""
        try:
            kind = kind_of(message, ("stop", "generate"))
        except InputError as error:
            self.error = error
            return
        if kind == "stop":
            self.stop()
        elif self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._generate_for, args=(message,), name="fsteer_lens watch", daemon=True)
            self._thread.start()

    def _generate_for(self, message: dict[str, Any]) -> None:
        self.error = None
        try:
            rank = message.get("rank")
            self.generate(text_of(message.get("prompt")), strength=message.get("strength"), rank=rank or None)
        except Exception as error:
            self.error = error
            tell(self._widget, live={"status": "failed", "text": shown(in_words(error))})


def watch(
    steering: FineSteer,
    model: SteerableModel,
    prompt: GivenPrompt,
    *,
    max_new_tokens: int = 32,
    **options: Unpack[FormatOptions],
) -> Watch:
    """Watch a steered generation in Jupyter: token by token while it is made, then with all that steering did.

    The prompt is generated for at once. Below it `figures.replay` stands; above it are a prompt of the reader's own,
    strength and rank, and buttons to generate and to stop. What was shown last stays readable without a kernel.

    Args:
        steering: what to put on the model.
        model: the model that it was fitted on.
        prompt: the first prompt.
        max_new_tokens: of each text, at most 256.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how prompts become
            tokens, see `tokens.prompt_ids`.

    Raises:
        InputError: no FineSteer, or options out of range.
        ContextLengthError, MismatchError: as in `generate`.
    """
    instance("watch", steering, FineSteer, "a FineSteer", fix="For others: figures.replay of a generation.")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
    passes = passes_of("watch", options, model, steering, [as_prompt(prompt)], FormatOptions.__annotations__)
    return Watch(steering, model, prompt, max_new_tokens=max_new_tokens, formatting=passes.formatting)
