"""The recorder of steps and the unsteered model beside them, against plain definitions; what they keep, and let go."""

import math
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from fsteer_lens import stream
from fsteer_lens.errors import InputError
from fsteer_lens.models import SteerableModel
from fsteer_lens.run import unsteered as unsteered_module
from fsteer_lens.run.decoding import Rules, Step, decode
from fsteer_lens.run.recorder import TOP, Recorder
from fsteer_lens.run.sampling import Sampling
from fsteer_lens.run.stopping import Stop
from fsteer_lens.run.unsteered import Unsteered
from fsteer_lens.trace.trace import Trace
from tests import made_up
from tests.running import batch_of, logits_of

LENGTHS = [4, 1, 3]
PROMPTS = [[0, 5, 6], [0, 7], [8, 9, 10, 11]]


def made_up_steps(vocab: int, seed: int = 0) -> Iterator[Step]:
    generator = torch.Generator().manual_seed(seed)
    for number in range(max(LENGTHS)):
        logprobs = torch.randn(len(LENGTHS), vocab, generator=generator).log_softmax(dim=-1)
        chosen = torch.randint(20, 200, (len(LENGTHS),), generator=generator)
        yield Step(chosen, logprobs, torch.tensor([number < length for length in LENGTHS]))


def test_every_number_is_its_plain_definition(tutor_model: SteerableModel) -> None:
    vocab = tutor_model.cfg.d_vocab
    steps, others = list(made_up_steps(vocab)), list(made_up_steps(vocab, seed=1))
    recorder = Recorder(tutor_model, PROMPTS)
    for step, other in zip(steps, others, strict=True):
        recorder.add(step, other.logprobs)
    found = recorder.steps()
    assert found.kl is not None and found.baseline_logprobs is not None and found.baseline_top_ids is not None
    for row, length in enumerate(LENGTHS):
        for number, (step, other) in enumerate(zip(steps, others, strict=True)):
            token, p, q = int(step.chosen[row]), step.logprobs[row].tolist(), other.logprobs[row].tolist()
            if number >= length:
                assert found.tokens[row, number] == -1 and (found.top_ids[row, number] == -1).all()
                assert (found.baseline_top_ids[row, number] == -1).all()
                numbers = (found.logprobs, found.baseline_logprobs, found.kl, found.top_logprobs)
                assert all(one[row, number].isnan().all() for one in numbers)
                continue
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            assert found.tokens[row, number] == token
            assert float(found.kl[row, number]) == pytest.approx(kl, abs=1e-4)
            assert float(found.logprobs[row, number]) == p[token]
            assert float(found.baseline_logprobs[row, number]) == q[token]
            for ids, likely in ((found.top_ids, p), (found.baseline_top_ids, q)):
                assert ids[row, number].tolist() == sorted(range(vocab), key=lambda i: -likely[i])[:TOP]
    assert [len(row) for row in found.texts] == LENGTHS
    assert found.top_texts is not None and [len(row) for row in found.top_texts] == LENGTHS


def test_without_an_unsteered_model_there_is_no_comparison(tutor_model: SteerableModel) -> None:
    recorder = Recorder(tutor_model, PROMPTS)
    for step in made_up_steps(tutor_model.cfg.d_vocab):
        recorder.add(step)
    trace = recorder.complete(Trace())
    assert trace.steps is not None
    assert trace.steps.kl is None and trace.steps.logprob_change is None and trace.steps.baseline_top_texts is None
    bos = tutor_model.tokenizer.bos_token_id
    assert trace.bos is not None and trace.bos.tolist() == [row[0] == bos for row in PROMPTS]
    assert trace.prompts is not None and [len(row) for row in trace.prompts] == [len(row) for row in PROMPTS]


def watched(steps: Iterable[Step], alive: list[int]) -> Iterator[Step]:
    """The steps; whenever one is asked for, how many of the earlier distributions are still held."""
    seen: list[weakref.ref[Tensor]] = []
    steps = iter(steps)
    while True:
        alive.append(sum(one() is not None for one in seen))
        step = next(steps, None)
        if step is None:
            return
        seen.append(weakref.ref(step.logprobs))
        yield step
        del step


@pytest.mark.parametrize("size", [1, 3, 32])
def test_the_unsteered_model_beside(
    model: SteerableModel, prompts: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities are those of one forward over the whole text; no more distributions are held than asked."""
    batch = batch_of(model, prompts[:2])
    monkeypatch.setattr(unsteered_module, "CHUNK_NUMBERS", size * 2 * model.cfg.d_vocab)
    rules = Rules(Sampling(), Stop(model, []), max_new_tokens=7, cache=True)
    session = made_up.steering(3).session_on(model, batch.mask.sum(dim=1), batch.mask)
    held: list[int] = []
    chosen, base = [], []
    for step, other in Unsteered(model, batch, cache=True).beside(
        watched(decode(model, batch, session, rules, [0, 1]), held)
    ):
        chosen.append(step.chosen)
        base.append(other)
        del step, other
    assert max(held) <= size
    tokens = torch.cat([batch.tokens, torch.stack(chosen, dim=1)], dim=1)
    mask = torch.cat([batch.mask, torch.ones(2, 7, dtype=torch.bool)], dim=1)
    plain = logits_of(model, type(batch)(tokens, mask))[:, -8:-1].float().log_softmax(dim=-1)
    torch.testing.assert_close(torch.stack(base, dim=1), plain, atol=1e-4, rtol=0)


def test_the_recorder_lets_distributions_go(tutor_model: SteerableModel) -> None:
    recorder, held = Recorder(tutor_model, PROMPTS), []
    for step in watched(made_up_steps(tutor_model.cfg.d_vocab), held):
        recorder.add(step, step.logprobs)
        del step
    assert max(held) <= 1


def test_stream_takes_the_options_of_sampling(tutor_model: SteerableModel, prompts: list[str]) -> None:
    def tokens(**options: object) -> list[int]:
        return [record.token for _, record in stream(tutor_model, prompts[0], max_new_tokens=8, **options)]  # type: ignore[arg-type]

    greedy = tokens()
    assert tokens(do_sample=True, top_k=1, seed=3) == greedy
    drawn = tokens(do_sample=True, temperature=5.0, seed=3)
    assert drawn == tokens(do_sample=True, temperature=5.0, seed=3)
    assert drawn != tokens(do_sample=True, temperature=5.0, seed=4)
    with pytest.raises(InputError, match=r"some of do_sample, temperature.*\['temprature'\]"):
        next(islice(stream(tutor_model, prompts[0], temprature=2.0), 1))  # type: ignore[call-arg]


def test_a_random_seed_is_drawn_once() -> None:
    drawn = Sampling(do_sample=True)
    one, other = (drawn.generators([4])[0].initial_seed() for _ in range(2))
    assert one == other != Sampling(do_sample=True).generators([4])[0].initial_seed()
    assert Sampling().generators([4]) == []
