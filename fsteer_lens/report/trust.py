"""Whether to trust a fit: what it came to on queries that it did not see, and what speaks against it."""

from typing import Final

from fsteer_lens.method.experts import FitReport, HeldOut
from fsteer_lens.report.page import Report

UNKNOWN: Final = (
    "How well these experts do on prompts that they were not fitted to is not known: training does not measure it. A "
    "fit without preset= does."
)
EXPLAINED: Final = (
    "Share of the shifts explained on training prompts that each fold left out, by number of experts; found again: how "
    "far clusters of one half of the data are those of the other half (prediction strength, 0 to 1). Error alone does "
    "not choose the number."
)


def add_trust(report: Report, fitted: FitReport, n_experts: int) -> None:
    """Add what is known, and what is doubted, to the chapter on the experts."""
    for doubt in fitted.doubts:
        report.add_text(f"Doubt: {doubt}.")
    told = fitted.held_out
    if told is None:
        report.add_text(UNKNOWN)
        return
    report.add_text("On training prompts that were left out:").add_table(["measure", "value"], _rows(told), words=True)
    if len(told.curve) > 1:
        rows = [
            [f"{count}{' (taken)' if count == n_experts else ''}", f"{explained:.3f}", _found(fitted, count)]
            for count, explained in told.curve.items()
        ]
        report.add_text(EXPLAINED).add_table(["experts", "explained", "found again"], rows)


def _rows(told: HeldOut) -> list[list[str]]:
    rows = [
        ["explained by the experts", f"{told.explained:.3f}"],
        ["by one vector for all, the mean shift", f"{told.mean_shift:.3f}"],
        ["by one linear map, ridge", f"{told.ridge:.3f}"],
        ["standard error of experts less mean shift", f"{told.standard_error:.3f}"],
        ["residual", "quadratic in the query" if told.quadratic else "affine in the query"],
    ]
    if not told.removal:
        return [*rows, ["routing", "one expert: nothing is routed"]]
    costs = ", ".join(f"{cost:.2f}" for cost in told.removal)
    return [
        *rows,
        ["strongest expert is the prompt's cluster", f"{told.agreement:.2f}"],
        ["calibration error of the strongest weight", f"{told.calibration:.2f}"],
        ["what each expert's cluster loses without it", costs],
    ]


def _found(fitted: FitReport, count: int) -> str:
    return f"{fitted.criterion[count]:.2f}" if count in fitted.criterion else ""
