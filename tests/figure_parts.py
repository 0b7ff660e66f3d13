"""Made-up traces and results of effects, and a reader of HTML, for the tests of figures."""

from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import torch

from fsteer_lens.effects import Knockout, Propagation, RankSweep
from fsteer_lens.trace.steps import Steps
from fsteer_lens.trace.trace import Trace

HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "a\nb", "🙂", "שלום", '"><b>', "\ud800", "", "&lt;i&gt;", "\0"]


class Elements(HTMLParser):
    """The elements of a piece of HTML, with their attributes, and its text."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(str(body))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def titled(self) -> list[dict[str, str]]:
        """Attributes of each token's element."""
        return [attributes for _, attributes in self.found if ": '" in attributes.get("title", "")]


def trace_of(
    n_prompt: int = 3,
    n_new: int = 2,
    steered: tuple[int, ...] = (0, 1, 2),
    weights: torch.Tensor | None = None,
    texts: tuple[str, ...] = ("n0", "<eos>"),
    prompt: tuple[str, ...] | None = None,
    **fields: Any,
) -> Trace:
    """A trace of one row as `generate(compare=True)` gives it, with made-up numbers at layer 4."""
    change = torch.zeros(1, n_prompt + n_new - 1)
    change[0, list(steered)] = 0.5
    nats = -0.1 * torch.arange(1, n_new + 1).float().unsqueeze(0)
    texts = (texts * n_new)[:n_new] if len(texts) != n_new else texts
    known: dict[str, Any] = {
        "ser": {4: torch.tensor([[0.8, 0.9]])},
        "gate": {4: torch.ones(1)},
        "weights": {4: torch.tensor([[0.1, 0.9]]) if weights is None else weights},
        "coefficients": {4: torch.tensor([[3.0, 4.0]])},
        "change": {4: change},
        "prompt_lengths": torch.tensor([n_prompt]),
        "first": torch.tensor([0]),
        "bos": torch.tensor([False]),
        "prompts": (tuple(f"p{i}" for i in range(n_prompt)) if prompt is None else prompt,),
        "unsteered": (("<i>plain", "<eos>"),),
        "steps": Steps(
            tokens=torch.arange(7, 7 + n_new).unsqueeze(0),
            texts=(texts,),
            logprobs=nats,
            top_ids=torch.stack([torch.arange(7, 7 + n_new), torch.ones(n_new).long()], dim=1).unsqueeze(0),
            top_logprobs=torch.stack([nats[0], torch.full((n_new,), -3.0)], dim=1).unsqueeze(0),
            top_texts=(tuple((text, "<tok1>") for text in texts),),
            special=torch.arange(n_new).unsqueeze(0) == n_new - 1,
            kl=4.0 / torch.arange(1, n_new + 1).float().unsqueeze(0) ** 2,
            baseline_logprobs=nats - 5,
            baseline_top_ids=torch.tensor([[[1, 7]] * n_new]),
            baseline_top_logprobs=torch.tensor([[[-0.3, -5.1]] * n_new]),
            baseline_top_texts=(tuple(("<tok1>", "n0") for _ in texts),),
        ),
    }
    return Trace(**{**known, **fields})


def knockout_of(
    loss: torch.Tensor, labels: Sequence[str], weights: torch.Tensor, effect_name: str = "margin (nats)"
) -> Knockout:
    """A knockout of one contrast for each label, whose removed experts cost what `loss` says, [k labels]."""
    experts = tuple(range(len(loss)))
    return Knockout(experts, tuple(labels), torch.zeros(loss.shape[1]), -loss, weights, effect_name)


def path_of(
    values: torch.Tensor,
    tokens: Sequence[str],
    edited_layers: tuple[int, ...] = (),
    prompt_length: int = 0,
    **parts: Any,
) -> Propagation:
    """A propagation whose numbers are all `values`, [layers s], but for the parts that are given by name."""
    names = ("norm", "size", "cosine", "carried", "edit", "attention", "mlp")
    return Propagation(tuple(tokens), prompt_length, edited_layers, **{**dict.fromkeys(names, values), **parts})


def rank_sweep_of(auroc: torch.Tensor) -> RankSweep:
    """A rank sweep of one query of each kind with this AUROC at each rank, [r]."""
    r = len(auroc)
    ratios, rates = torch.linspace(0, 1, r).expand(1, r), torch.ones(r)
    return RankSweep(tuple(range(1, r + 1)), ratios, 1 - ratios, rates, 1 - rates, auroc, effect={})
