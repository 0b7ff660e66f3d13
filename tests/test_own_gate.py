"""A gate of one's own: a class with one method that steers, combines, is recorded, drawn, explored and monitored."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fsteer_lens import Activations, FineSteer, Gate, explore, figures, fit_gate, generate, load, save
from fsteer_lens.errors import InputError
from fsteer_lens.method.gates import CutGate
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad, prompt_ids
from fsteer_lens.report import steering_report
from fsteer_lens.tutor import data
from tests.running import LAYER


class Longer(Gate):
    """Open for activations longer than one: a single method, and nothing else."""

    def gate(self, h: torch.Tensor) -> torch.Tensor:
        return (h.norm(dim=-1) > 1).float()


@dataclass(frozen=True, eq=False)
class Along(Gate):
    """Open along a direction, by a score of its own."""

    direction: torch.Tensor

    def gate(self, h: torch.Tensor) -> torch.Tensor:
        return (self.score(h) >= self.threshold).to(h)

    def score(self, h: torch.Tensor) -> torch.Tensor:
        return h @ self.direction

    @property
    def threshold(self) -> float:
        return 2.0


class Given(Gate):
    """Answers with what it was given."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def gate(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.values)


def test_it_steers_and_is_recorded(tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    opens, shuts = steering.with_gate(Longer()), steering.with_gate(~Longer())
    always = generate(tutor_model, prompts, steering.with_gate(None), max_new_tokens=6, progress=False)
    never = generate(tutor_model, prompts, None, max_new_tokens=6, progress=False)
    for by, expected, value in ((opens, always, 1.0), (shuts, never, 0.0)):
        made = generate(tutor_model, prompts, by, max_new_tokens=6, progress=False)
        assert made.texts == expected.texts
        assert made.trace.gate[LAYER].tolist() == [value] * len(prompts)
        assert made.trace.ser == {}, "there is no subspace"
    assert always.texts != never.texts
    watched = generate(tutor_model, prompts, opens.with_monitor(), max_new_tokens=6, progress=False)
    assert watched.texts == never.texts and watched.trace.gate[LAYER].tolist() == [1.0] * len(prompts)


def test_it_is_called_and_combines_with_fitted_ones(trained: dict[int, Activations]) -> None:
    h = trained[4].queries
    fitted = fit_gate(h, rank=4, general=h + torch.randn_like(h) * 30, kind="logistic")
    own, direction = Longer(), Along(torch.nn.functional.one_hot(torch.tensor(3), 128).float())
    assert torch.equal(own(h), own.gate(h))
    for one in (own & fitted, fitted & own):
        torch.testing.assert_close(one(h), torch.minimum(own(h), fitted(h)))
        torch.testing.assert_close(one.gates(h), torch.minimum(own(h).unsqueeze(1), fitted.gates(h)))
        assert one.ranks == fitted.ranks and one.at_rank(2).leaves[one.leaves.index(own)] is own
        assert torch.equal(one.readings(h)["ser"], fitted.readings(h)["ser"])
    torch.testing.assert_close((own | ~direction)(h), torch.maximum(own(h), 1 - direction(h)))
    assert torch.equal((~direction).readings(h)["score"], direction.score(h))
    with pytest.raises(InputError, match="at_rank: expected a gate on a subspace, got Longer"):
        own.at_rank(2)
    with pytest.raises(InputError, match="two gates that read at one layer, got layers 4 and 2"):
        fit_gate(h, rank=2, layer=4) & (fit_gate(h, rank=2, layer=2) | own)


@pytest.mark.parametrize("gate", [Longer(), Along(torch.ones(128))], ids=["value", "score"])
def test_a_cut_of_its_score_is_a_gate(gate: Gate, trained: dict[int, Activations]) -> None:
    h = trained[4].queries
    cut = float(gate.score(h).median())
    moved = gate.at_threshold(cut)
    assert isinstance(moved, CutGate) and moved.threshold == cut
    assert torch.equal(moved(h), (gate.score(h) >= cut).float())
    closed_above = (~gate).at_threshold(cut)
    assert torch.equal(closed_above(h), (gate.score(h) < cut).float())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.5, 1.5], r"Given at layer 4: expected gate values in \[0, 1\], got \[1.5\]"),
        ([0.5, float("nan")], r"gate values in \[0, 1\], got \[nan\]"),
    ],
)
def test_what_it_must_not_give_is_refused(steering: FineSteer, values: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        steering.with_gate(Given(values)).decide(LAYER, torch.randn(2, 128))


def test_no_file_holds_it_and_a_word_says_why(steering: FineSteer, tmp_path: Path) -> None:
    for gate in (Longer(), ~Longer() & steering.gate_at(LAYER), Longer().at_threshold(1.0)):  # type: ignore[operator]
        with pytest.raises(InputError, match=r"cannot save a Longer.*A file holds no code.*with_gate"):
            save(steering.with_gate(gate), tmp_path / "own.safetensors")
    assert not list(tmp_path.iterdir())


def test_it_is_drawn_explored_and_reported(
    tutor_model: SteerableModel, steering: FineSteer, trained: dict[int, Activations], tmp_path: Path
) -> None:
    told = data("safe")
    by = steering.with_gate(Along(trained[4].queries.mean(dim=0) / 100))
    general = [task.prompt for task in told.general_valid[::60]]
    explorer = explore(by, tutor_model, {"harm": told.valid.prompts[:4], "other": general}, progress=False)
    assert explorer.settings.rank is None and explorer.settings.threshold is None
    chosen = explorer.choose(threshold=1.5).state
    assert isinstance(chosen, FineSteer) and isinstance(chosen.gate, CutGate) and chosen.gate.threshold == 1.5
    with pytest.raises(InputError, match="a gate without ranks"):
        explorer.choose(rank=3)
    assert len(explorer.figure.data) == 5, "two histograms and a ROC curve"
    queries = explorer._pictured.by_group
    drawn = figures.gate_separation(by.gate, *queries.values())  # type: ignore[arg-type]
    assert drawn.layout.shapes[0].x0 == 2.0 and drawn.layout.xaxis.title.text == "gate value g"
    with pytest.raises(InputError, match=r"without ranks\. Draw it with gate_separation"):
        figures.rank_explorer(by.gate, queries)  # type: ignore[arg-type]
    report = steering_report(
        tutor_model, by, told.valid[:3], general[:3], max_new_tokens=3, sweep=False, progress=False
    )
    assert report.write(tmp_path / "report.html").stat().st_size > 10_000


def test_linear_and_cosine_gates_are_real_ones(
    tutor_model: SteerableModel, steering: FineSteer, trained: dict[int, Activations], tmp_path: Path
) -> None:
    told, own = data("safe"), trained[4]
    general = [task.prompt for task in told.general_train[::8]]
    from fsteer_lens import collect_queries
    from fsteer_lens.steering.fitting import put_together  # cosines open for many of them, which is not the point

    others = collect_queries(tutor_model, general, layer=4, progress=False)
    for kind in ("linear", "cosine"):
        by = put_together(own, gate=kind, general=others, experts=steering.experts_at(LAYER))
        gate = by.gate_at(LAYER)
        assert gate is not None and gate.layer == 4 and gate.d_model == 128 and gate.ranks == 0
        save(by, tmp_path / kind)
        found = load(tmp_path / kind, model=tutor_model).gate_at(LAYER)
        h = torch.cat([own.queries, others.queries])
        assert type(found) is type(gate) and torch.equal(found(h), gate(h)) and found.layer == 4
        moved = gate.at_threshold(gate.threshold + 0.1)
        assert moved.threshold == pytest.approx(gate.threshold + 0.1) and type(moved) is type(gate)
        assert (moved(h) <= gate(h)).all() if gate.opens_above else (moved(h) >= gate(h)).all()
        explorer = explore(by, tutor_model, {"harm": told.valid.prompts[:3], "other": general[:3]}, progress=False)
        assert explorer.choose(threshold=0.25).state.gate_at(LAYER).threshold == 0.25  # type: ignore[union-attr]
        item = generate(tutor_model, told.valid[0].prompt, by, max_new_tokens=2, progress=False)[0]
        ids = pad(tutor_model, [prompt_ids(tutor_model, told.valid[0].prompt)], "right")
        assert item.trace.gate[LAYER].shape == item.trace.score[LAYER].shape == (1,) and len(ids.tokens) == 1
    linear = fit_gate(own.queries, kind="linear", general=others.queries)
    assert (linear(own.queries) >= 0.5).float().mean() > 0.95 and (linear(others.queries) >= 0.5).float().mean() < 0.05


def test_a_gate_keeps_to_its_layer(steering: FineSteer, trained: dict[int, Activations]) -> None:
    elsewhere = fit_gate(trained[2].queries, rank=2, layer=2)
    with pytest.raises(
        InputError, match=r"FineSteer gate: expected a gate of layer 4, got one of layer 2.*gate_layer="
    ):
        steering.with_gate(elsewhere)
    assert replace(steering, layer=5, site="hook_resid_pre").gate is steering.gate, "one tensor, named from above"
    nowhere = fit_gate(trained[2].queries, rank=2)
    assert steering.with_gate(nowhere).gate_at(LAYER) is nowhere and (nowhere & elsewhere).layer == 2
