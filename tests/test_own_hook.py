"""A hook object of one's own: two methods, and it goes wherever the package's own go."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fsteer_lens import FineSteer, Trace, chain, effects, generate, save, stream
from fsteer_lens.errors import HookError, InputError, ShapeError, SiteError
from fsteer_lens.hooks import Link, State, View
from fsteer_lens.models import SteerableModel
from tests.running import LAYER, batch_of, logits_of, residual


@dataclass(frozen=True, eq=False)
class Shorten(Link):
    """No activation at this layer may be longer than `most`."""

    layer: int
    most: float

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def edit(self, state: State, layer: int, activation: torch.Tensor, view: View) -> torch.Tensor:
        h = activation.float()
        length = h.norm(dim=-1)
        if view.fresh:
            state.record(layer, query_length=state.query(layer, activation, view).norm(dim=-1))
        state.extend(layer, view, length=length)
        return ((self.most / length).clamp(max=1) - 1).unsqueeze(-1) * h


@dataclass(frozen=True, eq=False)
class Gives(Link):
    """Adds what it was given."""

    what: object
    layer: int = LAYER

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def edit(self, state: State, layer: int, activation: torch.Tensor, view: View) -> torch.Tensor | None:
        if isinstance(self.what, Exception):
            raise self.what
        return self.what  # type: ignore[return-value]


def test_it_edits_and_its_values_are_in_the_trace(model: SteerableModel, prompts: list[str]) -> None:
    batch = batch_of(model, prompts)
    before = residual(model, batch)
    most = float(before.norm(dim=-1)[batch.mask].median())
    with Shorten(LAYER, most).on(model, attention_mask=batch.mask) as trace:
        after = residual(model, batch)
    lengths = before.norm(dim=-1)
    torch.testing.assert_close(after.norm(dim=-1)[batch.mask], lengths.clamp(max=most)[batch.mask], atol=1e-3, rtol=0)
    torch.testing.assert_close(trace.own_by_token["length"][LAYER], lengths)
    torch.testing.assert_close(trace.own["query_length"][LAYER], lengths[:, -1])
    expected = (1 - most / lengths).clamp(min=0)
    torch.testing.assert_close(trace.change[LAYER][batch.mask], expected[batch.mask], atol=1e-4, rtol=0)
    assert trace.gate == {} and trace.layers == (LAYER,)


def test_every_way_of_running_gives_the_same(model: SteerableModel, prompts: list[str]) -> None:
    short = Shorten(LAYER, 0.5)
    options = {"max_new_tokens": 5, "progress": False}
    cached, plain = (generate(model, prompts, short, use_past_kv_cache=on, **options) for on in (True, False))  # type: ignore[arg-type]
    assert cached.texts == plain.texts != generate(model, prompts, None, **options).texts  # type: ignore[arg-type]
    for item, other in zip(cached, plain, strict=True):
        for one, two in ((item.trace.own, other.trace.own), (item.trace.own_by_token, other.trace.own_by_token)):
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(one[name][LAYER], two[name][LAYER], atol=1e-3, rtol=1e-3)
        n = len(item.trace.prompts[0]) + len(item.tokens) - 1  # type: ignore[index]
        assert item.trace.own_by_token["length"][LAYER].shape == (1, n)
    streamed = [text for text, _ in stream(model, prompts[0], short, max_new_tokens=5)]
    assert "".join(streamed).startswith(cached[0].text[:8])
    told = generate(model, prompts[0], short, compare=True, **options)[0]  # type: ignore[arg-type]
    asked = effects.counterfactual(model, short, prompts[:1], [told.tokens])
    torch.testing.assert_close(asked.steps.kl, told.trace.steps.kl, atol=1e-4, rtol=1e-3)  # type: ignore[union-attr]


def test_its_values_go_through_joining_and_json_lines(
    tutor_model: SteerableModel, steering: FineSteer, prompts: list[str], tmp_path: Path
) -> None:
    for by in (Shorten(LAYER, 5.0), chain(Shorten(LAYER, 5.0), steering)):
        made = generate(tutor_model, prompts, by, max_new_tokens=3, progress=False)
        whole = made.trace
        part = whole.link(0) if whole.parts else whole
        assert part.own["query_length"][LAYER].shape == (len(prompts),)
        rows = [item.trace.link(0) if whole.parts else item.trace for item in made]
        for index, row in enumerate(rows):
            length = row.own_by_token["length"][LAYER][0]
            torch.testing.assert_close(part.row(index).own_by_token["length"][LAYER][0], length)
        whole.to_jsonl(tmp_path / "trace.jsonl")
        back = Trace.from_jsonl(tmp_path / "trace.jsonl")
        back = back.link(0) if whole.parts else back
        torch.testing.assert_close(back.own["query_length"][LAYER], part.own["query_length"][LAYER])
        found, kept = back.own_by_token["length"][LAYER], part.own_by_token["length"][LAYER]
        for index in range(len(prompts)):
            n = rows[index].own_by_token["length"][LAYER].shape[1]
            torch.testing.assert_close(found[index, :n], kept[index, :n])
    frame = generate(tutor_model, prompts[:2], Shorten(LAYER, 5.0), max_new_tokens=1, progress=False).trace.to_frame()
    assert (frame["query_length"] > 0).all()


def test_a_chain_gives_every_link_what_enters_it(tutor_model: SteerableModel, steering: FineSteer) -> None:
    batch = batch_of(tutor_model, ["hello"])
    alone = logits_of(tutor_model, batch)
    opposite = Gives(torch.ones(128)), Gives(-torch.ones(128))
    with chain(*opposite).on(tutor_model) as trace:
        torch.testing.assert_close(logits_of(tutor_model, batch), alone, atol=1e-5, rtol=0)
    assert all((part.change[LAYER] > 0).all() for part in trace.parts) and (trace.change[LAYER] == 0).all()
    assert chain(*opposite).d_model is None and chain(opposite[0], steering).d_model == 128


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (torch.ones(7), ShapeError, r"what Gives\.edit gave: expected None, or a tensor.*\[1, \d+, 128\], got \[7\]"),
        ("nothing", ShapeError, r"what Gives\.edit gave.*got str"),
        (ZeroDivisionError("mine"), ZeroDivisionError, "mine"),
    ],
)
def test_what_goes_wrong_says_so_and_leaves_nothing(
    model: SteerableModel, what: object, error: type[Exception], words: str
) -> None:
    batch = batch_of(model, ["hello"])
    plain = logits_of(model, batch)
    with pytest.raises(error, match=words), Gives(what).on(model):
        logits_of(model, batch)
    assert torch.equal(logits_of(model, batch), plain)


def test_wrong_places_are_refused_and_no_file_holds_it(
    model: SteerableModel, steering: FineSteer, tmp_path: Path
) -> None:
    with pytest.raises(SiteError, match=r"0\.\.5"):
        Gives(None, layer=9).attach(model)
    with pytest.raises(HookError, match="never fired"), Gives(None).on(model):
        pass
    narrow = type("Narrow", (Gives,), {"d_model": 64})(None)
    with pytest.raises(ShapeError, match="d_model=64"):
        narrow.attach(model)
    with pytest.raises(ShapeError, match="one d_model"):
        chain(narrow, steering)
    for own in (Shorten(LAYER, 5.0), chain(steering, Shorten(LAYER, 5.0))):
        with pytest.raises(InputError, match=r"cannot save a Shorten.*A file holds no code"):
            save(own, tmp_path / "own.safetensors", model=model)
    assert not list(tmp_path.iterdir())
    assert steering.fingerprint is not None
    elsewhere = replace(steering.fingerprint, n_layers=7)
    mismatched = type("Fitted", (Gives,), {"fingerprint": elsewhere})(None)
    with pytest.raises(Exception, match="fitted on another model"):
        mismatched.attach(model)
