"""A device is not waited for in every token: nothing in hooks and in the loop asks for a tensor's value there."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsteer_lens import FineSteer, Schedule, SubspaceAblation, SubspaceProbe, Window, chain, generate
from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.tutor.loading import FOLDER
from tests.running import LAYER

aten = torch.ops.aten
ASKING = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default}
"""What hands a value, or a shape that depends on values, to the host: `bool`, `int`, `.item()`, a boolean index."""


class Waits(TorchDispatchMode):
    """Counts what would wait for a device, were the tensors on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if function in (aten.index.Tensor, aten.index_put_.default) else ()
        by_mask = any(one is not None and one.dtype == torch.bool for one in indices)
        self.count += function in ASKING or by_mask
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Counts the waits of a call, those of `.tolist()` and `.cpu()` among them."""
    mode = Waits()
    for name in ("tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            mode.count += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(run: Callable[[], Any]) -> int:
        mode.count = 0
        with mode:
            run()
        return mode.count

    return count


def forms(steering: FineSteer) -> dict[str, HookObject]:
    space = steering.gate_at(LAYER).subspace  # type: ignore[union-attr]
    return {
        "all": steering.with_scope("all"),
        "generated": steering.with_scope("generated"),
        "window": steering.with_scope(Window(1, 6)),
        "schedule": steering.with_scope("all").with_schedule(Schedule.decay(0.5)),
        "ablation": SubspaceAblation(space, layer=LAYER),
        "chain": chain(steering, SubspaceProbe(space, layer=LAYER)),
    }


NAMES = ["all", "generated", "window", "schedule", "ablation", "chain"]


def test_what_waits_is_counted(waits: Any) -> None:
    x = torch.ones(3)
    asking = [lambda: bool(x.any()), lambda: x[0].item(), lambda: x[x > 0], lambda: x.tolist(), lambda: x.cpu()]
    assert [waits(one) for one in asking] == [1] * len(asking)
    assert waits(lambda: torch.where(x > 0, x, 2 * x)[torch.tensor([0])]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_token_under_steering_waits_no_more_than_one_without(
    model: SteerableModel, steering: FineSteer, prompts: list[str], waits: Any, name: str
) -> None:
    def of(form: HookObject | None, new: int) -> int:
        return waits(lambda: generate(model, prompts, form, max_new_tokens=new, stop=[], progress=False))

    generate(model, prompts, forms(steering)[name], max_new_tokens=1, progress=False)
    steered, plain = (of(form, 9) - of(form, 3) for form in (forms(steering)[name], None))
    assert steered == plain


def test_the_loop_waits_once_a_token(tutor_model: SteerableModel, prompts: list[str], waits: Any) -> None:
    """What the model's own forward waits for is left out: it is run as often by itself."""
    from fsteer_lens.models.forward import Forward
    from fsteer_lens.prompts.tokens import pad, prompt_ids

    batch = pad(tutor_model, [prompt_ids(tutor_model, prompt) for prompt in prompts], "left")

    def forwards(new: int) -> None:
        forward, tokens, mask = Forward(tutor_model, cache=True), batch.tokens, batch.mask
        for _ in range(new):
            with torch.no_grad():
                chosen = forward(tokens, mask)[:, -1].argmax(dim=-1)
            tokens, mask = chosen.unsqueeze(1), mask.new_ones(len(chosen), 1)

    def of(new: int) -> int:
        return waits(lambda: generate(tutor_model, prompts, max_new_tokens=new, progress=False))

    alone = waits(lambda: forwards(9)) - waits(lambda: forwards(3))
    assert of(9) - of(3) - alone == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_token_of_a_plain_model_waits_no_more_under_steering(
    steering: FineSteer, prompts: list[str], waits: Any, name: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)

    def of(form: HookObject | None, new: int) -> int:
        how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        on = nullcontext() if form is None else form.on(network)
        with on:
            return waits(lambda: network.generate(batch.input_ids, attention_mask=batch.attention_mask, **how))

    steered, plain = (of(form, 9) - of(form, 3) for form in (forms(steering)[name], None))
    assert steered == plain
