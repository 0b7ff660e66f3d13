"""Probes and the ablation: what they read and what they take away."""

import pytest
import torch

from fsteer_lens import ExpertProbe, FineSteer, SubspaceAblation, SubspaceProbe
from fsteer_lens.errors import InputError, SiteError
from fsteer_lens.models import SteerableModel
from fsteer_lens.models.attaching import AddedHooks
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.tokens import pad, prompt_ids
from tests.running import LAYER, SITE, batch_of, logits_of, residual


def test_probes_read_every_token_and_change_nothing(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    gate, experts = steering.gate_at(LAYER), steering.experts_at(LAYER)
    assert gate is not None
    batch = batch_of(model, prompts)
    plain, stream = logits_of(model, batch), residual(model, batch)
    with (
        SubspaceProbe(gate.subspace, layer=LAYER).on(model) as scores,
        ExpertProbe(experts, layer=LAYER).on(model) as mix,
    ):
        assert torch.equal(logits_of(model, batch), plain)
    torch.testing.assert_close(scores.ser[LAYER], gate.subspace.energy_ratios(stream))
    torch.testing.assert_close(mix.weights[LAYER], experts.route(stream))
    assert scores.weights == {} and mix.ser == {}


def test_probe_follows_cached_decoding(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    gate = steering.gate_at(LAYER)
    assert gate is not None
    ids = prompt_ids(model, prompts[0])
    whole = pad(model, [[*ids, 40, 41, 42]], "right")
    expected = gate.subspace.energy_ratios(residual(model, whole))
    with SubspaceProbe(gate.subspace, layer=LAYER).on(model) as trace:
        forward = Forward(model, cache=True)
        for part in (ids, [40], [41], [42]):
            step = pad(model, [part], "right")
            forward(step.tokens, step.mask)
    torch.testing.assert_close(trace.ser[LAYER], expected, atol=1e-4, rtol=1e-4)


def test_ablation_takes_the_subspace_out(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    gate = steering.gate_at(LAYER)
    assert gate is not None
    space = gate.subspace
    batch = batch_of(model, prompts)
    before = residual(model, batch)
    ablation = SubspaceAblation(space, layer=LAYER, rank=5)
    with ablation.on(model) as trace:
        after = residual(model, batch)
    inside = space.at_rank(5)
    centred = before.double() - space.mean.double()
    basis = space.basis[:, :5].double()
    torch.testing.assert_close(after.double(), before.double() - centred @ basis @ basis.T, atol=1e-5, rtol=1e-5)
    assert inside.coordinates(after).abs().max() < 1e-4
    assert (trace.change[LAYER][batch.mask] > 0).all() and trace.change[LAYER][~batch.mask].isnan().all()
    with ablation.on(model), SubspaceAblation(space, layer=LAYER, rank=5).on(model):
        twice = residual(model, batch)
    torch.testing.assert_close(twice, after, atol=1e-4, rtol=1e-4)
    with ablation.on(model):
        assert not torch.equal(logits_of(model, batch), logits_of_plain(model, batch))


def test_what_an_earlier_hook_kept_is_not_written_to(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    """An edit in place would change what somebody else's hook has put aside without a copy."""
    batch = batch_of(model, prompts)
    stream = residual(model, batch)
    kept = {}
    gate = steering.gate_at(LAYER)
    assert gate is not None
    for ours in (steering.with_gate(None), SubspaceAblation(gate.subspace, layer=LAYER)):
        others = AddedHooks(model, [(SITE, lambda x, hook: kept.update(x=x))])
        try:
            with ours.on(model, attention_mask=batch.mask):
                logits_of(model, batch)
        finally:
            others.remove()
        assert torch.equal(kept["x"], stream)


def logits_of_plain(model: SteerableModel, batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
    from fsteer_lens.models.attaching import hooks_suspended

    with hooks_suspended(model):
        return logits_of(model, batch)


def test_bad_rank_and_layer_raise(tutor_model: SteerableModel, steering: FineSteer) -> None:
    gate = steering.gate_at(LAYER)
    assert gate is not None
    with pytest.raises(InputError, match="rank"):
        SubspaceAblation(gate.subspace, layer=LAYER, rank=gate.subspace.rank + 1)
    with pytest.raises(SiteError, match="layer"), SubspaceProbe(gate.subspace, layer=9).on(tutor_model):
        pass
