"""`explore` and what it returns: the widget's other half in the kernel."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack

import torch

from fsteer_lens import figures
from fsteer_lens.errors import InputError
from fsteer_lens.explorer.messages import MARKED, kind_of, text_of
from fsteer_lens.explorer.pictured import Pictured, grouped, read, shown
from fsteer_lens.explorer.settings import Settings, Subject
from fsteer_lens.explorer.widget import EXPLORER, in_words, make_widget, tell
from fsteer_lens.explorer.words import parts
from fsteer_lens.explorer.worlds import Unknown, Wrap, world_of
from fsteer_lens.figures.style import plain
from fsteer_lens.ground.checks import instance, optional, options_of, whole
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.hooks.probes import SubspaceAblation
from fsteer_lens.method.experts import FitReport, called, mentioned
from fsteer_lens.method.gates import OPEN, Gate
from fsteer_lens.method.linear_gates import out_of_fold
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, check_prompt
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.run.generation import Generation, generate
from fsteer_lens.steering.steering import FineSteer

if TYPE_CHECKING:
    import plotly.graph_objects


class Explorer:
    """A steering under sliders and switches; shows itself in Jupyter. `explore` makes one.

    Attributes:
        error: what the latest generation failed on, None where it did not; the widget shows it as text.
    """

    def __init__(
        self,
        subject: Subject,
        model: SteerableModel,
        pictured: Pictured,
        *,
        max_new_tokens: int,
        passes: Passes,
        title: str,
        unknown: Unknown | None,
        wrap: Wrap | None,
    ) -> None:
        self._subject, self._model, self._pictured = subject, model, pictured
        self._passes, self._max_new_tokens = passes, max_new_tokens
        self._unknown, self._wrap, self._title = unknown, wrap, title
        self._settings = subject.start()
        self.error: BaseException | None = None
        self._widget = make_widget(EXPLORER, data=self._data(), settings=self._settings.message())
        if self._widget is not None:
            self._widget.observe(self._take_settings, names="settings")
            self._widget.on_msg(self._take_message)

    def __repr__(self) -> str:
        return f"Explorer({self._subject.steering!r}, {len(self._pictured.prompts)} prompts, {self._settings})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, or the static figure where anywidget is not installed."""
        if self._widget is not None:
            return self._widget._repr_mimebundle_(**options)
        import plotly.io

        bundle = self.figure._repr_mimebundle_(**options)  # of the renderer that is set: none, outside of notebooks
        return bundle or plotly.io.renderers["plotly_mimetype"].to_mimebundle(self.figure.to_plotly_json())

    @property
    def settings(self) -> Settings:
        """Where the controls stand."""
        return self._settings

    @property
    def state(self) -> FineSteer | SubspaceAblation:
        """What the settings amount to: a steering as if made by `at_rank`, `at_threshold`, `with_gate(None)`,
        `with_strength`, `without_expert` and `without_residual`; in ablation mode the `SubspaceAblation`."""
        return self._subject.state(self._settings)

    @property
    def widget(self) -> Any | None:
        """The anywidget, None where that is not installed."""
        return self._widget

    @cached_property
    def figure(self) -> "plotly.graph_objects.Figure":
        """A static figure, for where widgets cannot run: `figures.rank_explorer`, or what the gate allows instead."""
        gate, groups = self._subject.gate, self._pictured.groups
        if gate is not None and gate.ranks:
            prompts = {group.name: group.prompts for group in groups}
            return figures.rank_explorer(gate, self._pictured.by_group, prompts, title=self._title)
        if gate is not None and self._subject.has_threshold and len(groups) > 1:
            first, *others = self._pictured.by_group.values()
            names = (groups[0].name, "all others")
            return figures.gate_separation(gate, first, torch.cat(others), names=names, title=self._title)
        labels = [group.name for group in groups for _ in group.prompts]
        weights = self._pictured.logits.softmax(dim=-1)
        return figures.expert_routing(weights, labels, self._pictured.prompts, title=self._title)

    def choose(self, **changes: Any) -> "Explorer":
        """Set controls from Python, by the names of `Settings`; the widget follows.

        Raises:
            InputError: no such control, or a value that does not fit the steering.
        """
        self._settings = self._subject.checked({**vars(self._settings), **changes})
        tell(self._widget, settings=self._settings.message())
        return self

    def generate(self, prompt: int | str = 0) -> Generation:
        """Generate with and without what the settings amount to, and show both texts in the widget.

        Args:
            prompt: number of a prompt that is shown, or a text of one's own, which goes through `wrap=`.

        Raises:
            InputError: no such prompt, or no text; and what `fsteer_lens.generate` raises.
        """
        asked: Prompt
        if isinstance(prompt, str):
            check_prompt(prompt)
            asked = self._wrap(prompt) if self._wrap else prompt
        else:
            prompts = self._pictured.prompts
            prompt = whole("prompt", prompt, 0, len(prompts) - 1, why="or a text")
            asked = prompts[prompt]
        options = {"max_new_tokens": self._max_new_tokens, "progress": False, **self._passes.formatting}
        made = generate(self._model, [asked], self.state, compare=True, **options)[0]
        steps = made.trace.steps
        assert made.baseline is not None and steps is not None and steps.kl is not None
        told: dict[str, Any] = {
            "unsteered": made.baseline.text,
            "steered": made.text,
            "tokens": list(zip(map(shown, steps.texts[0]), plain(steps.kl[0]), strict=True)),
            "decision": self._decision(made),
        }
        if isinstance(prompt, str):
            passes = replace(self._passes, progress=False)
            told["own"] = read(self._subject, self._model, grouped([asked], None), passes).row(0)
        self._answer("done", prompt, **told)
        return made

    # ------------------------------------------------------------------------------------------------ with the browser

    def _data(self) -> dict[str, Any]:
        """What the browser needs to know and never changes."""
        subject, strength, report = self._subject, self._subject.steering.strength, self._subject.experts.report
        most = max(3.0, 2 * abs(strength))
        return {
            **self._pictured.message(),
            "title": shown(self._title),
            "names": [shown(name) for name in called(subject.experts.n_experts, subject.experts.names)],
            "fit": _fit_lines(report, subject.gate),
            "composed": subject.gate is not None and not subject.has_threshold,
            "strengths": [-most if strength < 0 else 0.0, most],
            "marks_words": self._unknown is not None,
        }

    def _take_settings(self, change: Any) -> None:
        """Follow the browser; what does not fit is put back there."""
        try:
            self._settings = self._subject.checked(change["new"])
        except InputError as error:
            self.error = error
            tell(self._widget, settings=self._settings.message())

    def _take_message(self, _: Any, message: Any, buffers: Any) -> None:
        """Do what the browser asks for: mark the words of a text, or generate."""
        try:
            kind = kind_of(message, ("mark", "generate"))
            text = text_of(message.get("text")) if kind == "mark" else ""
        except InputError as error:
            self.error = error
            return
        if kind == "mark":
            self._mark(text)
        else:
            self._generate_for(message)

    def _mark(self, text: str) -> None:
        try:
            unknown = self._unknown(text) if self._unknown and len(text) <= MARKED else {}
        except Exception as error:  # of the caller's function, and no reason not to generate
            self.error, unknown = error, {}
        tell(self._widget, words={"text": shown(text), "parts": parts(shown(text), unknown)})

    def _generate_for(self, message: Mapping[str, Any]) -> None:
        """Generate for the browser: what fails is shown there, and kept in `error`."""
        prompt = message.get("prompt")
        prompt = prompt if isinstance(prompt, str | int) else None
        self.error = None
        self._answer("running", prompt)
        try:
            prompt = text_of(prompt) if isinstance(prompt, str) else prompt
            self._settings = self._subject.checked(message.get("settings"))
            tell(self._widget, settings=self._settings.message())
            self.generate(prompt)  # pyright: ignore[reportArgumentType]
        except BaseException as error:
            self.error = error
            self._answer("failed", prompt, error=shown(in_words(error)))
            if not isinstance(error, Exception):  # an interrupt is shown, and stays one
                raise

    def _answer(self, status: str, prompt: Any, **more: Any) -> None:
        prompt = shown(prompt) if isinstance(prompt, str) else prompt
        tell(self._widget, answer={"status": status, "prompt": prompt, "settings": self._settings.message(), **more})

    def _decision(self, made: Generation) -> str:
        """What gate and experts decided for one text, in words."""
        settings, subject = self._settings, self._subject
        if settings.mode == "ablation":
            return f"the subspace of rank {settings.rank} taken out of every token at layer {subject.gate_layer}"
        gate = float(made.trace.gate[subject.layer][0])
        weights = made.trace.weights[subject.layer][0]
        best = int(weights.argmax())
        told = f"gate {gate:.2f}, {'open' if gate >= OPEN else 'closed'}" if settings.gate else "always open"
        acting = "strongest:" if gate > 0 or not settings.gate else "nothing added; it would route to"
        return f"{told} · {acting} {mentioned(best, subject.experts.names)} with weight {float(weights[best]):.2f}"


def explore(
    steering: FineSteer,
    model: SteerableModel,
    prompts: Mapping[str, GivenPrompts] | GivenPrompts,
    *,
    layer: int | None = None,
    max_new_tokens: int = 32,
    limit: int | None = 250,
    title: str | None = None,
    unknown: Unknown | None = None,
    wrap: Wrap | None = None,
    **options: Unpack[PassOptions],
) -> Explorer:
    """Explore a steering in Jupyter: who is steered, by which experts, and what the model then says.

    Rank, threshold, strength, gate, experts and residual are under sliders and switches; pictures follow at once, and
    texts, once there are any, when a control is let go. `.state` is the steering that the controls amount to. The
    rank's second meaning, "ablation", takes the gate's subspace at that rank out of every token (`SubspaceAblation`)
    *instead of* steering, so that the texts show what the model loses with it; the other controls then have no effect.

    Args:
        steering: where there are several layers, everything but the strength is changed at one of them alone.
        model: the model that it was fitted on.
        prompts: groups of prompts {name: prompts}, those that need steering first: it is told from all others in the
            ROC curve. A plain sequence is one group, without such a curve.
        layer: which layer's gate and experts; None takes the first. With `gate_layer=` that layer's gate is explored.
        max_new_tokens: of the texts.
        limit: this many prompts of each group are shown, the first ones, and the widget says so; None shows all.
        title: above the widget.
        unknown: words of a text that the model does not know, with the nearest that it knows; they are marked in the
            reader's own prompts. None: `tutor.unknown` for the tutor, else nothing is marked.
        wrap: makes model input of the reader's own prompt. None: `tutor.chat` for the tutor without `chat=True`, else
            the prompt is taken as it is.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how prompts become
            tokens, see `tokens.prompt_ids`; `batch_size` (16), prompts per forward pass; `progress` (True), show a
            progress bar while the prompts are read.

    Raises:
        InputError: no FineSteer, no model, no prompts, a layer that is not steered, or options that do not fit.
        MismatchError: the steering was fitted on another model.
    """
    passes = options_of("explore", Passes, options)
    instance("explore", steering, FineSteer, "a FineSteer", fix="Other methods have no experts to explore.")
    instance("explore", model, SteerableModel, "a model of TransformerLens")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, model.cfg.n_ctx, why="the model's context")
    for name, function in (("unknown", unknown), ("wrap", wrap)):
        if function is not None and not callable(function):
            raise InputError(name, expected="a function or None", got=repr(function))
    optional(instance, "title", title, str, "text or None")
    subject = Subject(steering, steering.layers[0] if layer is None else layer)
    groups = grouped(prompts, limit)
    passes = passes.following(remembered(steering), model, [prompt for group in groups for prompt in group.prompts])
    steering.session_on(model)  # a steering of another model is refused before anything is read
    world = world_of(model)
    if world is not None:
        unknown = unknown or world.unknown
        wrap = wrap or (None if passes.chat else world.wrap)
    return Explorer(
        subject,
        model,
        read(subject, model, groups, passes),
        max_new_tokens=max_new_tokens,
        passes=passes,
        title=f"What does steering at layer {subject.layer} do?" if title is None else title,
        unknown=unknown,
        wrap=wrap,
    )


def _fit_lines(report: FitReport | None, gate: Gate | None) -> list[str]:
    """What gate and fit are worth on queries that they did not see, and what speaks against it, line by line."""
    apart = None if gate is None else out_of_fold(gate)
    of_gate = [] if apart is None else [f"gate, out of fold: {apart}"]
    if report is None:
        return of_gate
    told = [] if report.held_out is None else [f"fit, held out: {report.held_out}", report.held_out.curve_text]
    return of_gate + [line for line in told if line] + [f"doubt: {shown(doubt)}" for doubt in report.doubts]
