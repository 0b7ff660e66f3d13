"""The pages' code runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("page", "says"), [("hooks.md", "Calibration(strength="), ("gates.md", "AttackReport(")])
def test_code_of_a_page_runs_from_top_to_bottom(page: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert says in capsys.readouterr().out


def test_pages_of_numbers_hold_the_text_and_the_methods_of_their_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers take too long to make anew here; what stands around them must not fall behind."""
    monkeypatch.syspath_prepend(str(DOCS))
    import results  # type: ignore[import-not-found]

    from benchmarks.__main__ import INTRO

    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert page.startswith(results.INTRO) and page.endswith(results.NOTES)
    for name in (*results.BASELINES, results.DEFAULT, "no cross-fitting"):
        assert page.count(f"| {name} |") >= 2, name
    bench = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert bench.startswith(INTRO)
    titles = ("Decoding", "Collecting", "Fitting the experts", "Energy ratios", "A large vocabulary", "Beside other")
    for title in titles:
        assert f"\n## {title}" in bench
    for text in (page, bench, (DOCS / "results_public.md").read_text(encoding="utf-8")):
        assert "/home" not in text and "/work" not in text and "../shared" not in text
