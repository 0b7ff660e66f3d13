"""One page with every figure, drawn from made-up numbers and hostile tokens."""

from pathlib import Path
from typing import Any

import torch
from plotly.offline import get_plotlyjs

from fsteer_lens import figures, fit_subspace
from fsteer_lens.figures.style import CONFIG
from fsteer_lens.ground.estimates import Estimate, Sweep
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.trace.trace import join
from tests.figure_parts import HOSTILE, knockout_of, path_of, rank_sweep_of, trace_of
from tests.made_up import D_MODEL, experts

ATTACKS = [
    "<x-hostile>",
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    '"><svg onload="window.hacked = 1">',
    '<a href="javascript:alert(1)">link</a>',
    "<b>bold</b>",
    *HOSTILE,
]


def every_figure() -> dict[str, Any]:
    """Name and figure, hostile text wherever text is taken."""
    torch.manual_seed(0)
    n = len(ATTACKS)
    trace = join(
        [
            trace_of(
                n_prompt=n,
                n_new=n,
                steered=tuple(range(n)),
                prompt=tuple(ATTACKS),
                texts=tuple(ATTACKS),
                unsteered=(tuple(ATTACKS),),
            )
        ]
        * 2
    )
    change = torch.randn(n)
    change[1] = float("nan")
    ir, general = torch.randn(50, 12) * torch.linspace(4, 1, 12), torch.randn(40, 12)
    gate = fit_gate(ir, rank=3)
    names = ATTACKS[:4]
    estimates = tuple(Estimate(x, (x - 0.1, x + 0.1)) for x in (0.1, 0.5))
    made = Sweep("strength", (1.0, 2.0), estimates, estimates, estimates, ATTACKS[2], ATTACKS[1])
    layers = Sweep("layer", (1.0, 2.0), estimates, estimates, estimates, ATTACKS[2], ATTACKS[1])
    return {
        "expert_routing": figures.expert_routing(torch.rand(n, 4).softmax(-1), ATTACKS, ATTACKS),
        "expert_mix": figures.expert_mix(experts(1), torch.randn(D_MODEL), names=names),
        "token_scores": figures.token_scores(ATTACKS, change, centred=True, name=ATTACKS[2]),
        "token_experts": figures.token_experts(ATTACKS, torch.rand(n, 4).softmax(-1), names=names),
        "rank_explorer": figures.rank_explorer(gate, {ATTACKS[2]: ir, "general": general}, None),
        "expert_knockout": figures.expert_knockout(
            knockout_of(torch.randn(4, 4), names, torch.rand(4, 4), ATTACKS[1]), names=names
        ),
        "gate_separation": figures.gate_separation(gate, ir, general, names=(ATTACKS[2], ATTACKS[1])),
        "scree": figures.scree(fit_subspace(ir), rank_sweep_of(torch.rand(12)), rank=3),
        "layer_position": figures.layer_position(path_of(torch.randn(3, n), ATTACKS), what="cosine"),
        "steer_compare": figures.steer_compare(trace, titles=ATTACKS[: trace.n_rows]),
        "logprob_change": figures.logprob_change(ATTACKS, change),
        "strength_sweep": figures.strength_sweep({ATTACKS[2]: made, "b": made}),
        "layer_sweep": figures.layer_sweep(layers),
        "expert_geometry": figures.expert_geometry(experts(1), torch.randn(D_MODEL), names=names),
        "expert_tokens": figures.expert_tokens([[(t, 1.0) for t in ATTACKS]] * 4, names=names, limit=None),
        "trace_timeline": figures.trace_timeline(trace),
        "rich_scores": figures.token_scores(trace, rich=True, bundle=False),
        "rich_experts": figures.token_experts(
            ATTACKS, torch.tensor([[0.1, 0.9]] * (n - 1) + [[float("nan")] * 2]), rich=True, bundle=False
        ),
        "rich_compare": figures.steer_compare(trace, rich=True, bundle=False, limit=1),
    }


def write_page(parts: dict[str, Any], path: Path) -> Path:
    """A page with each figure in a section of its own; plotly and circuitsvis are inside once."""
    sections = []
    for name, figure in parts.items():
        is_html = isinstance(figure, figures.Html)
        body = figure.body if is_html else figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
        sections.append(f'<section id="{name}">{body}</section>')
    scripts = f"<script>{get_plotlyjs()}</script>{figures.circuitsvis_bundle()}"
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    path.write_text(f"<!doctype html><html><head>{head}{scripts}</head><body>{''.join(sections)}</body></html>")
    return path
