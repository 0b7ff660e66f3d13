"""`watch`: what kernel and browser tell each other, and what stays without either."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

import fsteer_lens as fs
from fsteer_lens import FineSteer
from fsteer_lens.errors import InputError
from fsteer_lens.explorer import Watch, watching
from fsteer_lens.models import SteerableModel
from tests.running import n_hooks

QUIET = {"max_new_tokens": 8}


@pytest.fixture
def watched(tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]) -> Watch:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    return fs.watch(steering, tutor_model, prompts[0], **QUIET)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def test_the_first_prompt_is_generated_for_at_once(
    watched: Watch, tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    plain = fs.generate(tutor_model, prompts[0], steering, compare=True, progress=False, **QUIET)[0]
    assert watched.made.tokens == plain.tokens and watched.widget is not None
    assert watched.widget.view == watched.view.body == fs.figures.replay(watched.made, titles=[prompts[0]]).body
    assert watched.widget.live == {"status": "done"} and watched.widget.start["strength"] == steering.strength
    bundle, _ = watched._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/html"] == watched.view.body


def test_a_message_generates_in_a_thread_and_tokens_come_one_by_one(watched: Watch, prompts: list[str]) -> None:
    seen: list[dict[str, Any]] = []
    watched.widget.observe(lambda change: seen.append(change["new"]), names="live")
    before = watched.widget.view
    watched._take_message(None, {"kind": "generate", "prompt": prompts[-1], "strength": 2.0, "rank": 3}, [])
    wait_for(lambda: bool(seen) and seen[-1]["status"] == "done")
    texts = [one["text"] for one in seen if one["status"] == "running"]
    assert len(texts) == len(watched.made.tokens)
    assert all(longer.startswith(text) for text, longer in pairwise(texts))
    assert watched.widget.view != before and watched.error is None


def test_it_stops_after_the_next_token_and_shows_what_there_is(watched: Watch, prompts: list[str]) -> None:
    watched._max_new_tokens = 90
    watched.widget.observe(lambda change: watched._take_message(None, {"kind": "stop"}, []), names="live")
    made = watched.generate(prompts[0])
    assert len(made.tokens) == 1 and made.trace.replay is not None


@pytest.mark.parametrize("message", [None, 3, [], {}, {"kind": None}, {"kind": ["stop"]}, {"kind": "sing"}])
def test_a_message_that_is_none_is_kept_as_an_error_and_does_nothing(watched: Watch, message: Any) -> None:
    before = watched.widget.view
    watched._take_message(None, message, [])
    assert isinstance(watched.error, InputError) and watched.widget.view == before


def test_what_fails_is_shown_and_the_last_view_stays(
    watched: Watch, tutor_model: SteerableModel, prompts: list[str]
) -> None:
    before = watched.widget.view
    for wrong, says in (
        ({"strength": "much"}, "strength"),
        ({"rank": 10_000}, "rank"),
        ({"prompt": ""}, ""),
        ({"prompt": [1]}, "prompt: expected text"),
    ):
        watched._take_message(None, {"kind": "generate", "prompt": prompts[0], "strength": 1.0, **wrong}, [])
        wait_for(lambda: watched.widget.live["status"] in ("failed", "done") and not watched._thread.is_alive())  # type: ignore[union-attr]
        if watched.widget.live["status"] == "failed":
            assert says in watched.widget.live["text"] and watched.error is not None
            assert watched.widget.view == before
    assert n_hooks(tutor_model) == 0


def test_without_anywidget_the_view_is_shown_as_it_is(
    tutor_model: SteerableModel, steering: FineSteer, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "make_widget", lambda *kind, **values: None)
    watched = fs.watch(steering, tutor_model, prompts[0], **QUIET)
    assert watched.widget is None and watched._repr_mimebundle_()["text/html"] == watched.view.body
    assert len(watched.generate(prompts[-1], strength=0.5).tokens) <= 8


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 257}, {"max_new_tokens": 0}], ids=lambda wrong: str(next(iter(wrong.values())))
)
def test_what_cannot_be_watched_is_refused(
    tutor_model: SteerableModel, steering: FineSteer, prompts: list[str], wrong: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        fs.watch(steering, tutor_model, prompts[0], **wrong)
    with pytest.raises(TypeError, match="batch_size"):
        fs.watch(steering, tutor_model, prompts[0], batch_size=3)  # type: ignore[call-arg]
