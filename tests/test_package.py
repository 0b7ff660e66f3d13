"""What the package promises about itself: its names, its version, its errors and what importing it costs."""

import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import fsteer_lens
from fsteer_lens import errors

ROOT = Path(__file__).parents[1]
IMPORTED_ON_USE = [
    "transformer_lens",
    "transformers",
    "sklearn",
    "plotly",
    "circuitsvis",
    "pandas",
    "anywidget",
]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_all_is_the_public_namespace() -> None:
    submodules = {name for name, value in vars(fsteer_lens).items() if isinstance(value, ModuleType)}
    visible = {name for name in dir(fsteer_lens) if not name.startswith("_")} - submodules
    declared = set(fsteer_lens.__all__)
    assert declared - submodules - {"__version__"} == visible


def test_every_public_name_is_there_once_and_documented() -> None:
    assert len(set(fsteer_lens.__all__)) == len(fsteer_lens.__all__)
    for name in fsteer_lens.__all__:
        value = getattr(fsteer_lens, name)
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


def test_no_module_is_named_like_a_public_function() -> None:
    files = {path.stem for path in Path(fsteer_lens.__file__).parent.iterdir()}
    functions = {name for name in fsteer_lens.__all__ if inspect.isroutine(getattr(fsteer_lens, name))}
    assert not files & functions


def test_version_is_that_of_the_distribution_and_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert fsteer_lens.__version__ == importlib.metadata.version("fsteer-lens") == declared


def test_locks_hold_the_model_library_and_no_machine() -> None:
    runtime = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    dev = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in runtime
    assert "transformer-lens==3.9.0" in runtime
    assert "-r requirements.lock" in dev
    for line in runtime + dev:
        pinned = line.startswith("#") or line == "-r requirements.lock" or line.count("==") == 1
        assert pinned and not any(sign in line for sign in ("://", "@", "+", "nvidia", " /")), line
    names = [line.partition("==")[0].lower().replace("_", "-") for line in runtime + dev if "==" in line]
    assert len(names) == len(set(names)), "a package is pinned twice"


def test_errors_form_one_tree_that_the_docstring_draws() -> None:
    members = inspect.getmembers(errors, lambda value: inspect.isclass(value) and issubclass(value, Exception))
    drawn = (errors.__doc__ or "").split()
    assert len(members) > 1
    for name, value in members:
        assert issubclass(value, errors.FsteerError), name
        assert name in drawn, f"{name} is missing from the tree in the docstring"


def test_import_loads_no_heavy_library() -> None:
    code = f"import sys, fsteer_lens; print([name for name in {IMPORTED_ON_USE!r} if name in sys.modules])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
