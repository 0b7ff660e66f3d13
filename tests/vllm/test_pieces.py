"""An engine that runs prompts in pieces and has little room: requests that differ, side by side, as by `generate`."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from fsteer_lens.serving import arguments, record_of
from tests.vllm.engines import NEW, SYSTEM, Served, answers, compare, counted, engine, prompts, sampling

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

LATE = ["late", "last", "window", "schedule", "monitor", "step", "ablation", "chain", None]


@pytest.fixture(scope="module")
def llm(served: Served) -> Iterator[Any]:
    made = engine(served, max_num_batched_tokens=64, max_num_seqs=16, num_gpu_blocks_override=26)
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("name", LATE)
def test_every_setting_says_what_generate_says(served: Served, llm: Any, name: str | None) -> None:
    rows = prompts(served.model)
    for answer, ids in zip(answers(llm, rows, [name] * len(rows)), rows, strict=True):
        compare(served, answer, ids, name)


def test_requests_that_differ_share_a_batch(served: Served, llm: Any) -> None:
    rows = prompts(served.model)
    ids, names = [rows[place % len(rows)] for place in range(len(LATE) * 2)], LATE * 2
    for answer, row, name in zip(answers(llm, ids, names), ids, names, strict=True):
        compare(served, answer, row, name)


def test_the_control_steered_answers_differ_from_unsteered_ones(served: Served, llm: Any) -> None:
    rows = prompts(served.model)[:3]
    steered, plain = answers(llm, rows, ["late"] * 3), answers(llm, rows, [None] * 3)
    assert all(one.outputs[0].token_ids != two.outputs[0].token_ids for one, two in zip(steered, plain, strict=True))


def test_requests_arrive_one_after_another_and_some_are_taken_back(served: Served, llm: Any) -> None:
    rows, names = prompts(served.model), ["late", None, "step", "chain", "schedule", "late"]
    core, done = llm.llm_engine, {}
    waiting = list(zip(rows, names, strict=True))
    taken_back = {"1", "4"}
    for step in range(200):
        if waiting and step % 3 == 0:
            number = str(len(rows) - len(waiting))
            ids, name = waiting.pop(0)
            core.add_request(number, {"prompt_token_ids": ids}, sampling(name))
        if step == 14:
            core.abort_request(list(taken_back))
        done |= {one.request_id: one for one in core.step() if one.finished}
        if not waiting and not core.has_unfinished_requests():
            break
    assert set(map(str, range(len(rows)))) - taken_back <= set(done)
    for number in sorted(set(done) - taken_back):
        compare(served, done[number], rows[int(number)], names[int(number)])
    after = answers(llm, rows[:2], ["late", None])
    for answer, ids, name in zip(after, rows, ["late", None], strict=False):
        compare(served, answer, ids, name)


def test_requests_that_were_dropped_for_want_of_room_go_on_as_decided(served: Served, llm: Any) -> None:
    rows = prompts(served.model, SYSTEM) * 2
    names: list[str | None] = ["late", "last", None, "step", "ablation", "schedule"] * 2
    before = counted(llm, "vllm:num_preemptions")
    got = answers(llm, rows, names, new=40)
    assert counted(llm, "vllm:num_preemptions") > before
    for answer, ids, name in zip(got, rows, names, strict=True):
        compare(served, answer, ids, name, new=40)


def test_several_samples_of_one_prompt(served: Served, llm: Any) -> None:
    from vllm import SamplingParams

    ids = prompts(served.model)[0]
    # vLLM draws greedily once: here it draws four times, each time among one token
    params = SamplingParams(n=4, temperature=1, top_k=1, max_tokens=NEW, extra_args=arguments("late"))
    (answer,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    assert len(answer.outputs) == 4
    compare(served, answer, ids, "late")


def test_blocks_that_no_steering_touched_are_shared_and_others_are_not(served: Served, llm: Any) -> None:
    llm.reset_prefix_cache()
    rows = prompts(served.model, SYSTEM)[:3]
    for names in (["last"] * 3, [None] * 3, ["last"] * 3):
        before = counted(llm, "vllm:prefix_cache_hits")
        for answer, ids, name in zip(answers(llm, rows, names, new=24), rows, names, strict=True):
            compare(served, answer, ids, name, new=24)
        shared = counted(llm, "vllm:prefix_cache_hits") - before
    assert shared > 0


def test_a_second_turn_does_not_take_what_the_first_was_steered_to(served: Served, llm: Any) -> None:
    """Its first turn is a prompt now, which scope "generated" leaves alone."""
    llm.reset_prefix_cache()
    rows = prompts(served.model, SYSTEM)[:3]
    first = answers(llm, rows, ["last"] * 3, new=40)
    more = served.model.tokenizer.encode("<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")
    again = [[*ids, *one.outputs[0].token_ids, *more] for ids, one in zip(rows, first, strict=True)]
    for name in ("last", None):
        for answer, ids in zip(answers(llm, again, [name] * 3), again, strict=True):
            compare(served, answer, ids, name)


def test_what_needs_prompts_at_once_is_refused(served: Served, llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    for name in ("all", "prompt"):
        with pytest.raises(VLLMValidationError, match="--no-enable-chunked-prefill"):
            answers(llm, prompts(served.model)[:1], [name])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"fsteer": "nobody"}, "one of ablation"),
        ({"fsteer": "late", "fsteer_strenght": 2}, "fsteer_strenght"),
        ({"fsteer": "chain"}, "runs a prompt once"),
        ({"fsteer": "ablation", "fsteer_strength": 2.0}, "that has a strength"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(served: Served, llm: Any, asked: dict[str, Any], told: str) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=told):
        params = SamplingParams(temperature=0, max_tokens=2, extra_args=asked)
        llm.generate([{"prompt_token_ids": prompts(served.model)[0]}], params, use_tqdm=False)
    compare(served, answers(llm, prompts(served.model)[:1], ["late"])[0], prompts(served.model)[0], "late")


def test_a_strength_of_the_request_counts(served: Served, llm: Any) -> None:
    ids = prompts(served.model)[0]
    asked = {"prompt_token_ids": ids}
    (answer,) = llm.generate([asked], sampling("late", strength=0.0), use_tqdm=False)
    assert tuple(answer.outputs[0].token_ids) == served.expected(ids, None).tokens
    assert record_of(answer).strength == (0.0,) and sum(record_of(answer).edited.values()) == 0


def test_the_whole_trace_can_be_asked_for(served: Served, llm: Any) -> None:
    import fsteer_lens as fs

    ids = prompts(served.model)[0]
    llm.generate([{"prompt_token_ids": ids}], sampling("step", key="mine"), use_tqdm=False)
    (records,) = llm.collective_rpc("fsteer_trace", args=("mine",))
    found, expected = fs.Trace.from_records(records), served.expected(ids, "step").trace
    for name in ("change", "step_gate"):
        for layer, values in getattr(expected, name).items():
            assert getattr(found, name)[layer].shape == values.shape
            difference = (getattr(found, name)[layer] - values).abs().nan_to_num(0).max()
            assert float(difference) < 1e-3
    assert llm.collective_rpc("fsteer_trace", args=("yours",)) == [None]
