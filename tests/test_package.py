"""What the package promises about itself: its names, its version, its errors and what importing it costs."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import fsteer_lens
from fsteer_lens import errors

ROOT = Path(__file__).parents[1]
IMPORTED_ON_USE = [
    "transformer_lens",
    "transformers",
    "huggingface_hub",
    "sklearn",
    "plotly",
    "circuitsvis",
    "pandas",
    "anywidget",
]
# `ground` is what the other rooms stand on, and no room for users.
ROOMS = sorted(path.parent.name for path in Path(fsteer_lens.__file__).parent.glob("*/__init__.py"))
ROOMS.remove("ground")
MAX_NAMES = 46
TOP_OF_0_1 = """
    Activations AttackReport Calibration Chain Contrast ContrastSet EnergyGate Evaluation ExpertProbe Experts Explorer
    FineSteer FitReport Gate GateReport Generation Generations LogisticGate MeanShift NearestCentroid NullSpaceSteering
    Parts PcaDirection Prompting QuantileGate Report Schedule Search Splits StepRecord Subspace SubspaceAblation
    SubspaceProbe ThresholdGate Trace Trial Window attack_gate calibrate chain collect collect_queries effects errors
    evaluate evaluation explore figures fit fit_ablations fit_directional_ablation fit_experts fit_gate fit_mean_shift
    fit_nearest_centroid fit_null_space fit_pca_direction fit_subspace gate_report generate load models save search
    steering_report stream tutor
""".split()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def face(room: str) -> ModuleType:
    return importlib.import_module(f"fsteer_lens.{room}" if room else "fsteer_lens")


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_all_is_the_public_namespace(room: str) -> None:
    def ours(value: object) -> bool:
        return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("fsteer_lens.")

    declared = {name for name in face(room).__all__ if ours(getattr(face(room), name))}
    bound = {name for name, value in vars(face(room)).items() if ours(value) and not name.startswith("_")}
    assert bound == declared


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_is_there_once_and_documented(room: str) -> None:
    names = face(room).__all__
    assert names and len(set(names)) == len(names)
    for name in names:
        value = getattr(face(room), name)
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


def test_the_top_is_small_and_shows_nothing_but_public_names() -> None:
    assert len(fsteer_lens.__all__) <= MAX_NAMES
    assert set(dir(fsteer_lens)) == {*fsteer_lens.__all__, *ROOMS, "__version__"}
    assert all(inspect.ismodule(getattr(fsteer_lens, room)) for room in ROOMS)


@pytest.mark.parametrize("name", sorted(set(TOP_OF_0_1) - set(fsteer_lens.__all__)))
def test_a_name_that_moved_is_found_and_tells_its_new_address(name: str) -> None:
    with pytest.warns(DeprecationWarning) as told:
        value = getattr(fsteer_lens, name)
    address = re.match(r"fsteer_lens\.(\w+) is now (fsteer_lens\.\w+)\.(\w+);", str(told[0].message))
    assert address and address[1] == address[3] == name
    room = importlib.import_module(address[2])
    assert name in room.__all__ and getattr(room, name) is value


@pytest.mark.parametrize("use", ["from fsteer_lens import MeanShift", "fsteer_lens.MeanShift"])
def test_a_name_that_moved_warns_the_line_that_uses_it(use: str) -> None:
    done = run_python(f"import fsteer_lens\n{use}")
    assert done.returncode == 0, done.stderr
    assert "<string>:2: DeprecationWarning: fsteer_lens.MeanShift is now fsteer_lens.steering.MeanShift" in done.stderr


def test_a_name_that_is_gone_says_what_to_use_and_a_misspelt_one_is_unknown() -> None:
    with pytest.raises(AttributeError, match=r"fit_gate\(queries, kind='cosine', general=\.\.\.\)"):
        _ = fsteer_lens.fit_cosine_gate
    with pytest.raises(AttributeError, match="no attribute 'fit_gates'"):
        _ = fsteer_lens.fit_gates


def test_modules_without_a_place_in_all_that_users_reach_from_the_top() -> None:
    assert {"prompt_ids", "text_ids", "answer_ids"} <= set(dir(fsteer_lens.tokens))
    assert fsteer_lens.tutor.loading.FOLDER.is_dir()


def test_no_module_is_named_like_a_public_function() -> None:
    files = {path.stem for path in Path(fsteer_lens.__file__).parent.iterdir()}
    functions = {name for name in fsteer_lens.__all__ if inspect.isroutine(getattr(fsteer_lens, name))}
    assert not files & functions


def test_version_is_that_of_the_distribution_and_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert fsteer_lens.__version__ == importlib.metadata.version("fsteer-lens") == declared


def test_locks_hold_the_model_library_and_no_machine() -> None:
    locks = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.lock")}
    pins = {
        name: re.findall(r"^([\w.-]+)==([\w.]+)((?: \\\n)?(?:.*--hash=sha256:[0-9a-f]{64})+)", lock, re.M)
        for name, lock in locks.items()
    }
    assert ("torch", "2.13.0") in [pin[:2] for pin in pins["requirements"]]
    assert ("transformer-lens", "3.9.0") in [pin[:2] for pin in pins["requirements"]]
    assert "\n-r requirements.lock\n" in locks["requirements-dev"]
    for name, lock in locks.items():
        assert lock.count("==") == len(pins[name]) > 0, f"{name}: a pin without a hash"
        lines = [line for line in lock.splitlines() if not line.startswith("#")]
        assert not [line for line in lines if any(sign in line for sign in ("://", "@", "+", "nvidia", " /"))]
    names = [pin[0].lower().replace("_", "-") for name in ("requirements", "requirements-dev") for pin in pins[name]]
    assert len(names) == len(set(names)), "a package is pinned twice"


def test_errors_form_one_tree_that_the_docstring_draws() -> None:
    members = inspect.getmembers(errors, lambda value: inspect.isclass(value) and issubclass(value, Exception))
    drawn = (errors.__doc__ or "").split()
    assert len(members) > 1
    for name, value in members:
        assert issubclass(value, errors.FsteerError), name
        assert name in drawn, f"{name} is missing from the tree in the docstring"


@pytest.mark.parametrize(
    ("code", "late"),
    [
        ("import fsteer_lens, fsteer_lens.cli", ("torch", "numpy", *IMPORTED_ON_USE)),
        (
            f"import fsteer_lens\nfor name in {(*fsteer_lens.__all__, *ROOMS)!r}: getattr(fsteer_lens, name)",
            IMPORTED_ON_USE,
        ),
    ],
    ids=["the package", "everything in it"],
)
def test_imports_load_no_heavy_library(code: str, late: Sequence[str]) -> None:
    done = run_python(f"{code}\nimport sys; print([name for name in {late!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_names_come_from_where_a_type_checker_finds_them() -> None:
    tree = ast.parse(Path(fsteer_lens.__file__).read_text(encoding="utf-8"))
    typed = next(node.body for node in tree.body if isinstance(node, ast.If))
    homes = {one.name: str(line.module) for line in typed if isinstance(line, ast.ImportFrom) for one in line.names}
    for name, home in homes.items():
        assert getattr(importlib.import_module(home), name) is getattr(fsteer_lens, name), name
    assert {*fsteer_lens.__all__, *ROOMS} <= set(homes)


def test_an_interrupt_while_the_command_imports_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    command = [Path(sys.executable).parent / "fsteer-lens", *"generate --model tutor --steering some hello".split()]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_no_function_has_more_than_ten_parameters_but_two() -> None:
    """Every parameter counts, *args and **kwargs too; what travels together is one value, or options by name."""
    long = set()
    for path in sorted(Path(fsteer_lens.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                if len([one for one in every if one is not None and one.arg not in ("self", "cls")]) > 10:
                    long.add((path.name, getattr(node, "name", "lambda")))
    assert long == {("fitting_experts.py", "fit_experts"), ("generation.py", "generate")}
