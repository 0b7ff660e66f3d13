"""What it takes to get a report's numbers again: versions, machine, the steering and its model."""

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

import torch

from fsteer_lens.report.page import Report
from fsteer_lens.steering.steering import FineSteer, Steering

PACKAGES: Final = ("fsteer-lens", "torch", "transformer-lens", "transformers", "plotly")


def machine_rows() -> list[list[str]]:
    """When, with what and on what kind of machine."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [
        ["written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"],
        ["versions", f"{versions}, Python {platform.python_version()}"],
        ["machine", f"{platform.system()} {platform.machine()}, torch with {torch.get_num_threads()} threads"],
    ]


def steering_rows(steering: Steering, name: str = "") -> list[list[str]]:
    """The steering, its gates and experts, and the fingerprint of its model; `name` goes before each row's name."""
    rows = [["steering", repr(steering)]]
    for layer in steering.hooked_layers:
        gate = steering.gate_at(layer)
        experts = steering.experts_at(layer) if isinstance(steering, FineSteer) and layer in steering.layers else None
        told = [repr(part) for part in (gate, experts) if part is not None]
        rows.append([f"layer {layer}", ", ".join(told) or "no gate"])
        if experts is not None and experts.report is not None:
            rows.append([f"layer {layer}, fit", repr(experts.report)])
            if experts.report.held_out is not None:
                rows.append([f"layer {layer}, fit, held out", str(experts.report.held_out)])
            rows += [[f"layer {layer}, fit, doubt", doubt] for doubt in experts.report.doubts]
    if steering.fingerprint is not None:
        known = {key: value for key, value in asdict(steering.fingerprint).items() if key != "probe"}
        rows.append(["model", ", ".join(f"{key} {value}" for key, value in known.items())])
    return [[f"{name}: {what}" if name else what, value] for what, value in rows]


def add_settings(report: Report, rows: list[list[str]]) -> None:
    """Add the chapter that a report closes with."""
    report.add_heading("Settings").add_text("With these the same numbers come out again.")
    report.add_table(["what", "value"], rows, words=True)
