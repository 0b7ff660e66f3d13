"""An engine that runs prompts at once, and so takes steerings that edit them."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.vllm.engines import SYSTEM, Served, answers, compare, counted, engine, prompts

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

NAMES = ["all", "prompt", "late", "ablation", "chain", None]


@pytest.fixture(scope="module")
def llm(served: Served) -> Iterator[Any]:
    made = engine(served, enable_chunked_prefill=False, max_num_seqs=16, num_gpu_blocks_override=40)
    yield made
    made.llm_engine.engine_core.shutdown()


def test_requests_that_differ_share_a_batch(served: Served, llm: Any) -> None:
    rows = prompts(served.model)
    for shift in range(len(NAMES)):
        names = NAMES[shift:] + NAMES[:shift]
        for answer, ids, name in zip(answers(llm, rows, names), rows, names, strict=True):
            compare(served, answer, ids, name)


@pytest.mark.parametrize("name", ["all", "prompt", "ablation"])
def test_what_an_edited_prompt_has_left_is_used_by_nobody_else(served: Served, llm: Any, name: str) -> None:
    llm.reset_prefix_cache()
    rows = prompts(served.model, SYSTEM)[:3]
    for names in ([name] * 3, [None] * 3, [name] * 3, [None] * 3):
        before = counted(llm, "vllm:prefix_cache_hits")
        for answer, ids, one in zip(answers(llm, rows, names), rows, names, strict=True):
            compare(served, answer, ids, one)
        shared = counted(llm, "vllm:prefix_cache_hits") - before
    assert shared > 0  # by requests without a steering


def test_an_edited_prompt_that_was_dropped_for_want_of_room_is_edited_again(served: Served, llm: Any) -> None:
    rows = prompts(served.model, SYSTEM) * 2
    names: list[str | None] = ["all", "prompt", None] * 4
    before = counted(llm, "vllm:num_preemptions")
    got = answers(llm, rows, names, new=40)
    assert counted(llm, "vllm:num_preemptions") > before
    for answer, ids, name in zip(got, rows, names, strict=True):
        compare(served, answer, ids, name, new=40)
