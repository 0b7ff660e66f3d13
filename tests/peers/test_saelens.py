"""Beside SAELens: SAEs that it splices into a model, and hooks of this package on the same model.

The SAEs here are planted: what they return is a projection that is known without running them. So every expected value
comes from the plain model and hooks of TransformerLens alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsteer_lens import FineSteer, generate, stream
from fsteer_lens.errors import HookError, MismatchError, SiteError
from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import Batch, pad, prompt_ids
from tests.page_code import differences
from tests.running import LAYER, SITE, batch_of, logits_of, n_hooks
from tests.test_steering import oracle_edit

pytest.importorskip("sae_lens", reason="needs SAELens, which has an environment of its own: make test-peers")

from sae_lens import SAE, HookedSAETransformer, StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata

AFTER = f"blocks.{LAYER + 1}.hook_resid_pre"
"""The same tensor as SITE, one hook point later."""
PLACES = ["blocks.2.hook_resid_post", AFTER, "blocks.5.hook_resid_post"]

WAYS = ["saes around on", "on around saes", "run_with_saes", "add_sae, then attach", "attach, then add_sae"]

Edit = tuple[str, Callable[..., Tensor | None]]


# --------------------------------------------------------------------------------------------------- models and SAEs


@pytest.fixture
def sae_hooked(hooked: SteerableModel) -> SteerableModel:
    """The tutor as SAELens' HookedTransformer."""
    model = HookedSAETransformer(hooked.cfg)
    model.load_state_dict(hooked.state_dict())  # type: ignore[attr-defined]
    model.tokenizer = hooked.tokenizer
    return model.eval()


@pytest.fixture
def sae_bridge() -> SteerableModel:
    """The tutor as SAELens' Bridge."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fsteer_lens.tutor.loading import FOLDER

    network = AutoModelForCausalLM.from_pretrained(FOLDER)
    network.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return SAETransformerBridge.boot_transformers(str(FOLDER), hf_model=network, tokenizer=tokenizer, device="cpu")


@pytest.fixture(params=["sae_hooked", "sae_bridge"])
def sae_model(request: pytest.FixtureRequest, steering: FineSteer) -> SteerableModel:
    """Either class, known to the steering already: its fingerprint was checked before any SAE came."""
    model = request.getfixturevalue(request.param)
    steering.attach(model).detach()
    return model


DIRECTIONS = torch.linalg.qr(torch.randn(128, 112, generator=torch.Generator().manual_seed(3)))[0]


def sae_at(name: str) -> SAE[Any]:
    """An SAE whose features are the two signs of 112 directions: it returns what of its input lies in their span."""
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=224, device="cpu", metadata=SAEMetadata(hook_name=name)))
    return _planted(sae)


def transcoder(name: str, name_out: str) -> SAE[Any]:
    """The same function from one hook point to another."""
    metadata = SAEMetadata(hook_name=name, hook_name_out=name_out)
    cfg = TranscoderConfig(d_in=128, d_out=128, d_sae=224, device="cpu", metadata=metadata, apply_b_dec_to_input=False)
    return _planted(Transcoder(cfg))


def _planted(sae: SAE[Any]) -> SAE[Any]:
    sae.W_enc.data = torch.cat([DIRECTIONS, -DIRECTIONS], dim=1)
    sae.W_dec.data = torch.cat([DIRECTIONS, -DIRECTIONS], dim=1).T.contiguous()
    return sae.requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- by hand


def projection(x: Tensor, hook: Any = None) -> Tensor:
    """What a planted SAE does, without it."""
    return x @ DIRECTIONS @ DIRECTIONS.T


def edit_of(steering: FineSteer, where: Tensor) -> Callable[..., Tensor]:
    """The steering's edit, without its hooks: at the columns of prompts, [b s], which end in one column."""
    last = int(where[0].nonzero().max())

    def edit(x: Tensor, hook: Any = None) -> Tensor:
        return x + (where[..., None] * oracle_edit(steering, x[:, last])[:, None]).to(x.dtype)

    return edit


def by_hand(hooked: SteerableModel, batch: Batch, *edits: Edit) -> Tensor:
    """Logits of the plain model with edits by TransformerLens' own hooks, in this order where they share a point."""
    with torch.no_grad():
        return hooked.run_with_hooks(batch.tokens, attention_mask=batch.mask.long(), fwd_hooks=list(edits))  # type: ignore[attr-defined]


def assert_same(found: Tensor, expected: Tensor, batch: Batch) -> None:
    found, expected = found[batch.mask].log_softmax(-1), expected[batch.mask].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def distance(found: Tensor, other: Tensor, batch: Batch) -> float:
    return float((found[batch.mask].log_softmax(-1) - other[batch.mask].log_softmax(-1)).abs().max())


@contextmanager
def attached(hook_object: HookObject, model: SteerableModel, batch: Batch) -> Iterator[None]:
    handle = hook_object.attach(model, attention_mask=batch.mask)
    yield
    handle.detach()


@contextmanager
def added(model: Any, sae: SAE[Any], error: bool = False) -> Iterator[None]:
    model.add_sae(sae, use_error_term=error)
    yield
    model.reset_saes()


def run(way: str, model: Any, batch: Batch, steering: FineSteer, sae: SAE[Any], error: bool = False) -> Tensor:
    """Logits with both on the model, put there in one of the ways that there are."""
    on = steering.on(model, attention_mask=batch.mask)
    if way == "run_with_saes":
        with on, torch.no_grad():
            return model.run_with_saes(
                batch.tokens, saes=[sae], use_error_term=error, attention_mask=batch.mask.long(), return_type="logits"
            )
    contexts = {
        "saes around on": [lambda: model.saes([sae], use_error_term=error), lambda: on],
        "on around saes": [lambda: on, lambda: model.saes([sae], use_error_term=error)],
        "add_sae, then attach": [lambda: added(model, sae, error), lambda: attached(steering, model, batch)],
        "attach, then add_sae": [lambda: attached(steering, model, batch), lambda: added(model, sae, error)],
    }[way]
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        return logits_of(model, batch)


# ------------------------------------------------------------------------------------------------- at different points


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_both_act_exactly_in_whatever_order_they_came(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], place: str, way: str
) -> None:
    batch = batch_of(sae_model, prompts)
    before, hooks = logits_of(sae_model, batch), n_hooks(sae_model)
    found = run(way, sae_model, batch, steering, sae_at(place))

    edit = edit_of(steering, batch.mask)
    assert_same(found, by_hand(hooked, batch, (SITE, edit), (place, projection)), batch)
    for alone in ((SITE, edit), (place, projection)):
        assert distance(found, by_hand(hooked, batch, alone), batch) > 0.1
    assert torch.equal(logits_of(sae_model, batch), before) and n_hooks(sae_model) == hooks


@pytest.mark.parametrize("place", PLACES)
def test_error_term_passes_steering_through(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], place: str
) -> None:
    batch = batch_of(sae_model, prompts)
    found = run("on around saes", sae_model, batch, steering, sae_at(place), error=True)
    assert_same(found, by_hand(hooked, batch, (SITE, edit_of(steering, batch.mask))), batch)
    assert distance(found, by_hand(hooked, batch), batch) > 0.1


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_features_are_those_of_the_steered_stream(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], place: str, error: bool
) -> None:
    batch = batch_of(sae_model, prompts)
    sae = sae_at(place)

    def features() -> Tensor:
        _, cache = sae_model.run_with_cache_with_saes(
            batch.tokens, saes=[sae], use_error_term=error, attention_mask=batch.mask.long()
        )
        name = getattr(sae_model, "get_sae_hook_name", lambda sae: f"{place}.hook_sae_acts_post")(sae)
        return cache[name][batch.mask]

    with steering.on(sae_model, attention_mask=batch.mask):
        found = features()
    seen = {}
    edit = edit_of(steering, batch.mask)
    by_hand(hooked, batch, (SITE, edit), (place, lambda x, hook: seen.update(x=x)))
    signs = seen["x"][batch.mask] @ DIRECTIONS
    torch.testing.assert_close(found, torch.cat([signs, -signs], dim=1).relu(), atol=1e-4, rtol=1e-4)
    moved = float((features() - found).abs().max())
    assert moved == 0 if place == PLACES[0] else moved > 0.1


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_generate_is_the_steered_and_spliced_model(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], place: str, cache: bool
) -> None:
    with sae_model.saes([sae_at(place)]):
        found = generate(
            sae_model, prompts[0], steering, max_new_tokens=8, use_past_kv_cache=cache, compare=True, progress=False
        )[0]
        assert n_hooks(sae_model) == 0

    ids, tokens = prompt_ids(hooked, prompts[0]), torch.tensor(found.tokens)
    text = pad(hooked, [[*ids, *found.tokens[:-1]]], "left")
    splice = (place, projection)
    steer = (SITE, edit_of(steering, torch.arange(text.tokens.shape[1])[None] < len(ids)))

    def expected(*edits: Edit) -> Tensor:
        return by_hand(hooked, text, *edits)[0, len(ids) - 1 :].log_softmax(-1)

    def of_tokens(logprobs: Tensor) -> Tensor:
        return logprobs[torch.arange(len(tokens)), tokens]

    both = expected(steer, splice)
    assert torch.equal(both.argmax(-1), tokens)
    steps = found.trace.steps
    assert steps is not None and steps.baseline_logprobs is not None
    torch.testing.assert_close(steps.logprobs[0], of_tokens(both), atol=1e-4, rtol=0)
    torch.testing.assert_close(steps.baseline_logprobs[0], of_tokens(expected(splice)), atol=1e-4, rtol=0)
    for alone in (steer, splice):
        assert float((of_tokens(both) - of_tokens(expected(alone))).abs().max()) > 1e-3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sae_first", [True, False])
def test_undone_in_either_order(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], place: str, sae_first: bool
) -> None:
    batch = batch_of(sae_model, prompts)
    before, hooks = logits_of(sae_model, batch), n_hooks(sae_model)
    handle = steering.attach(sae_model, attention_mask=batch.mask)
    sae_model.add_sae(sae_at(place))
    if sae_first:
        sae_model.reset_saes()
        assert_same(logits_of(sae_model, batch), by_hand(hooked, batch, (SITE, edit_of(steering, batch.mask))), batch)
        handle.detach()
    else:
        handle.detach()
        assert_same(logits_of(sae_model, batch), by_hand(hooked, batch, (place, projection)), batch)
        sae_model.reset_saes()
    assert torch.equal(logits_of(sae_model, batch), before) and n_hooks(sae_model) == hooks


def test_fwd_hooks_beside_an_sae(
    sae_hooked: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    batch = batch_of(sae_hooked, prompts)
    hooks = steering.fwd_hooks(attention_mask=batch.mask)
    with torch.no_grad():
        found = sae_hooked.run_with_hooks_with_saes(
            batch.tokens, saes=[sae_at(AFTER)], fwd_hooks=hooks, attention_mask=batch.mask.long()
        )
    expected = by_hand(hooked, batch, (SITE, edit_of(steering, batch.mask)), (AFTER, projection))
    assert_same(found, expected, batch)
    assert hooks.trace.gate[LAYER].shape == (len(prompts),)


def test_fwd_hooks_that_were_ignored_have_no_trace(sae_bridge: Any, steering: FineSteer, prompts: list[str]) -> None:
    """SAELens' Bridge knows the residual stream by other names, and ignores hooks at names that it does not know."""
    batch = batch_of(sae_bridge, prompts)
    hooks = steering.fwd_hooks(attention_mask=batch.mask)
    with torch.no_grad():
        ignored = sae_bridge.run_with_hooks(batch.tokens, attention_mask=batch.mask.long(), fwd_hooks=hooks)
    assert torch.equal(ignored, logits_of(sae_bridge, batch)), "it acted: this test has no reason left"
    with pytest.raises(HookError, match="never fired"):
        _ = hooks.trace


@pytest.mark.parametrize("kind", ["sae_hooked", "sae_bridge"])
def test_first_check_of_the_model_names_an_earlier_sae(
    request: pytest.FixtureRequest, kind: str, steering: FineSteer, prompts: list[str]
) -> None:
    model = request.getfixturevalue(kind)
    batch = batch_of(model, prompts)
    with (
        pytest.raises(MismatchError, match=r"with SAEs at blocks\.2\.hook_"),
        model.saes([sae_at(PLACES[0])]),
        steering.on(model),
    ):
        pass
    with model.saes([sae_at(PLACES[0])], use_error_term=True), steering.on(model, attention_mask=batch.mask):
        logits_of(model, batch)


# ----------------------------------------------------------------------------------------------------- at one point


def test_sae_in_the_place_of_the_hook_point_is_an_error(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    batch = batch_of(sae_model, prompts)
    sae_model.add_sae(sae_at(SITE))
    told = pytest.raises(SiteError, match=f"SAE is spliced in at '{SITE}'.*reset_saes")
    with told, steering.on(sae_model):
        pass
    with told:
        steering.attach(sae_model)
    with told:
        generate(sae_model, prompts[0], steering, max_new_tokens=2, progress=False)
    sae_model.reset_saes()
    streamed = stream(sae_model, prompts[0], steering, max_new_tokens=2)
    next(streamed)
    sae_model.add_sae(sae_at(SITE))
    with told:
        next(streamed)
    assert n_hooks(sae_model) == 0
    assert_same(logits_of(sae_model, batch), by_hand(hooked, batch, (SITE, projection)), batch)
    sae_model.reset_saes()
    with steering.on(sae_model, attention_mask=batch.mask):
        found = logits_of(sae_model, batch)
    assert_same(found, by_hand(hooked, batch, (SITE, edit_of(steering, batch.mask))), batch)


@pytest.mark.parametrize("way", ["saes", "run_with_saes", "add_sae", "add_sae and reset_saes"])
@pytest.mark.parametrize("by", ["on", "attach"])
def test_splicing_over_the_hook_is_told(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], by: str, way: str
) -> None:
    batch = batch_of(sae_model, prompts)
    before = logits_of(sae_model, batch)
    sae = sae_at(SITE)
    used = steering.on(sae_model, attention_mask=batch.mask) if by == "on" else attached(steering, sae_model, batch)
    with pytest.raises(HookError, match="taken off the model by somebody else"), used:
        assert distance(logits_of(sae_model, batch), before, batch) > 0.1
        if way == "saes":
            with sae_model.saes([sae]):
                spliced = logits_of(sae_model, batch)
        elif way == "run_with_saes":
            with torch.no_grad():
                spliced = sae_model.run_with_saes(batch.tokens, saes=[sae], attention_mask=batch.mask.long())
        else:
            sae_model.add_sae(sae)
            spliced = logits_of(sae_model, batch)
            if way == "add_sae and reset_saes":
                sae_model.reset_saes()
        assert_same(spliced, by_hand(hooked, batch, (SITE, projection)), batch)  # the steering did not act
    sae_model.reset_saes()
    assert torch.equal(logits_of(sae_model, batch), before) and n_hooks(sae_model) == 0
    with steering.on(sae_model, attention_mask=batch.mask):
        again = logits_of(sae_model, batch)
    assert_same(again, by_hand(hooked, batch, (SITE, edit_of(steering, batch.mask))), batch)


def test_the_neighbouring_names_say_which_comes_first(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    batch = batch_of(sae_model, prompts)
    edit = edit_of(steering, batch.mask)
    later = replace(steering, layer=LAYER + 1, site="hook_resid_pre", fingerprint=None)
    with steering.on(sae_model, attention_mask=batch.mask), sae_model.saes([sae_at(AFTER)]):
        steering_first = logits_of(sae_model, batch)
    with sae_model.saes([sae_at(SITE)]), later.on(sae_model, attention_mask=batch.mask):
        sae_first = logits_of(sae_model, batch)
    assert_same(steering_first, by_hand(hooked, batch, (SITE, edit), (SITE, projection)), batch)
    assert_same(sae_first, by_hand(hooked, batch, (SITE, projection), (SITE, edit)), batch)
    assert distance(steering_first, sae_first, batch) > 0.1


@pytest.mark.parametrize("first", ["steering", "transcoder"])
def test_transcoder_that_reads_our_point(
    sae_model: Any, hooked: SteerableModel, steering: FineSteer, prompts: list[str], first: str
) -> None:
    batch = batch_of(sae_model, prompts)
    out = f"blocks.{LAYER + 1}.hook_mlp_out"
    before = logits_of(sae_model, batch)
    seen: dict[str, Tensor] = {}
    reading: list[Edit] = [(SITE, edit_of(steering, batch.mask)), (SITE, lambda x, hook: seen.update(x=x))]
    order, other = (reading, reading[::-1]) if first == "steering" else (reading[::-1], reading)
    replaced: Edit = (out, lambda x, hook: projection(seen["x"]))
    expected = by_hand(hooked, batch, *order, replaced)
    assert distance(expected, by_hand(hooked, batch, *other, replaced), batch) > 0.1

    if first == "transcoder":
        sae_model.add_sae(transcoder(SITE, out))
    handle = steering.attach(sae_model, attention_mask=batch.mask)
    if first == "steering":
        sae_model.add_sae(transcoder(SITE, out))
    assert_same(logits_of(sae_model, batch), expected, batch)
    sae_model.reset_saes()  # clears every hook of the point where the transcoder read
    assert torch.equal(logits_of(sae_model, batch), before)
    with pytest.raises(HookError, match="taken off the model by somebody else"):
        handle.detach()
    assert n_hooks(sae_model) == 0


def test_code_of_the_page_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert differences(Path(__file__).parents[2] / "docs" / "how_to" / "with_saelens.md") == []
