"""What holds over hours and beside others: nothing grows, nothing is left behind, whatever interrupts.

Each test stands for one thing that happens to whoever runs this for long: many generations, many models, workers that
are forked or spawned, an event loop, Ctrl-C at any line, a full disk, a folder that is read-only, two writers.
"""

import asyncio
import gc
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import textwrap
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens import FineSteer, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.models import SteerableModel
from tests.running import n_hooks

pytestmark = pytest.mark.slow
PROMPTS = [tutor.data("safe").test[0].prompt, tutor.data("safe").general_test[0].prompt]
OPTIONS: dict[str, Any] = {"max_new_tokens": 2, "progress": False}
PACKAGE = str(Path(fs.__file__).parent)


def memory() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def test_generations_leave_no_hook_and_take_no_more_memory(tutor_model: SteerableModel, steering: FineSteer) -> None:
    def generate(n: int) -> None:
        for _ in range(n):
            fs.generate(tutor_model, PROMPTS[:1], steering, **OPTIONS)
            steering.attach(tutor_model).detach()

    hooks = n_hooks(tutor_model)
    generate(50)  # caches fill
    gc.collect()
    before, kept = memory(), len(gc.get_objects())
    generate(300)
    gc.collect()
    assert n_hooks(tutor_model) == hooks == 0
    assert memory() - before < 16, "a leak of a tensor a generation would be seen"
    assert len(gc.get_objects()) - kept < 300, "nothing is kept of a generation"


def test_models_that_are_let_go_are_freed(steering: FineSteer) -> None:
    seen = []
    for _ in range(5):
        model = tutor.load()
        fs.generate(model, PROMPTS[:1], steering, **OPTIONS)
        seen.append(weakref.ref(model))
        del model
        gc.collect()
    assert [one() is None for one in seen] == [True] * 5


WORKER = """
    import multiprocessing, sys
    import torch
    torch.set_num_threads(1)
    import fsteer_lens as fs

    def texts(path):
        model = fs.tutor.load()
        return fs.generate(model, {prompts!r}, fs.load(path, model=model), max_new_tokens=4, progress=False).texts

    if __name__ == "__main__":
        if sys.argv[2] == "fork":
            fs.tutor.load()  # forked with a model in memory
        with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
            print(pool.map(texts, [sys.argv[1]] * 2))
"""


@pytest.mark.parametrize("start", multiprocessing.get_all_start_methods())
def test_workers_that_are_started_in_any_way_say_the_same(
    start: str, steering: FineSteer, tutor_model: SteerableModel, tmp_path: Path
) -> None:
    fs.save(steering, tmp_path / "s.safetensors", model=tutor_model)
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER.format(prompts=PROMPTS)))
    done = subprocess.run(
        [sys.executable, tmp_path / "worker.py", tmp_path / "s.safetensors", start],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    own = fs.generate(tutor_model, PROMPTS, steering, max_new_tokens=4, progress=False).texts
    assert done.stdout.strip() == str([own, own])


def test_an_event_loop_gets_the_texts_of_each_task(tutor_model: SteerableModel, steering: FineSteer) -> None:
    def text(prompt: str, hook: FineSteer | None) -> str:
        return fs.generate(tutor_model, prompt, hook, **OPTIONS).texts[0]

    async def all_at_once() -> list[str]:
        asked = [(prompt, hook) for prompt in PROMPTS for hook in (steering, None)] * 3
        return await asyncio.gather(*(asyncio.to_thread(text, *one) for one in asked))

    expected = [text(prompt, hook) for prompt in PROMPTS for hook in (steering, None)] * 3
    assert asyncio.run(all_at_once()) == expected and n_hooks(tutor_model) == 0


class Interrupting:
    """Raises KeyboardInterrupt at the n-th line of the package that is run: what Ctrl-C does, at a chosen place."""

    def __init__(self, n: float) -> None:
        self.left = n
        self.lines = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def run(self, call: Any) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("what", ["generate", "collect", "fit", "save"])
def test_an_interrupt_anywhere_leaves_a_model_as_it_was(
    what: str, tutor_model: SteerableModel, steering: FineSteer, tmp_path: Path
) -> None:
    train = tutor.data("safe").train[:12]
    acts = fs.collect(tutor_model, train, layer=4, shift="last_prompt", progress=False)
    path = tmp_path / "s.safetensors"
    fs.save(steering, path, model=tutor_model)
    calls = {
        "generate": lambda: fs.generate(tutor_model, PROMPTS, steering, compare=True, **OPTIONS),
        "collect": lambda: fs.collect(tutor_model, train, layer=4, shift="last_prompt", progress=False),
        "fit": lambda: fs.fit(acts, rank=2, n_experts=2),
        "save": lambda: fs.save(steering.with_strength(2.0), path, model=tutor_model),
    }
    expected = fs.generate(tutor_model, PROMPTS, steering, **OPTIONS).texts
    whole = Interrupting(float("inf"))
    whole.run(calls[what])
    assert whole.lines > 100, "the control: it has been counted"
    for place in random.Random(what).sample(range(1, whole.lines), 12):
        with pytest.raises(KeyboardInterrupt):
            Interrupting(place).run(calls[what])
        gc.collect()  # what was on its way when the interrupt came goes with the traceback
        assert n_hooks(tutor_model) == 0, f"after line {place}"
        assert [item.name for item in tmp_path.iterdir()] == [path.name], f"after line {place}"
        fs.load(path, model=tutor_model)  # the old one or the new one, and whole
    assert fs.generate(tutor_model, PROMPTS, steering, **OPTIONS).texts == expected


def test_a_full_disk_is_told_and_loses_nothing(
    tutor_model: SteerableModel, steering: FineSteer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fs.generate(tutor_model, PROMPTS, steering, compare=True, replay=True, **OPTIONS)
    acts = fs.collect(tutor_model, tutor.data("safe").train[:4], layer=4, progress=False)
    writers = {
        "s.safetensors": lambda path: fs.save(steering, path, model=tutor_model),
        "a.safetensors": acts.save,
        "t.jsonl": made.trace.to_jsonl,
        "t.jsonl.gz": made.trace.to_jsonl,
        "c.jsonl": tutor.data("safe").train[:4].to_jsonl,
        "f.html": lambda path: fs.figures.save(fs.figures.replay(made), path),
    }
    for name, write in writers.items():
        (tmp_path / name).write_bytes(b"old")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(InputError, match=r"cannot write .*No space left"):
                write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"old", name
        write(tmp_path / name)  # the control: with room it is written
        assert (tmp_path / name).read_bytes() != b"old", name
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(writers)


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


READ_ONLY = """
    import os, sys
    if os.geteuid() == 0:
        os.setgid(65534); os.setuid(65534)  # root may write everywhere
    from pathlib import Path
    from fsteer_lens.errors import InputError
    from fsteer_lens.ground.files import write_atomically
    told = []
    for path in (Path(sys.argv[1]) / "new", Path(sys.argv[2]) / "kept"):
        try:
            write_atomically(path, b"x")
        except InputError as error:
            told.append(str(error))
    print(told)
"""


@pytest.fixture
def open_to_others() -> Iterator[Path]:
    """A folder that other users can enter; that of `tmp_path` lies in one that they cannot."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users as on POSIX")
def test_a_folder_and_a_file_that_are_read_only_are_told(open_to_others: Path) -> None:
    script = "import torch\n" + textwrap.dedent(READ_ONLY)
    folder, open_folder = open_to_others / "folder", open_to_others / "open"
    folder.mkdir()
    folder.chmod(0o555)
    open_folder.mkdir()
    open_folder.chmod(0o777)
    (open_folder / "kept").write_bytes(b"old")
    (open_folder / "kept").chmod(0o444)
    done = subprocess.run(
        [sys.executable, "-c", script, folder, open_folder], capture_output=True, text=True, check=False
    )
    if "Permission denied" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("another user cannot read the package here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Permission denied" in done.stdout and "one that is read-only" in done.stdout
    assert not list(folder.iterdir()) and (open_folder / "kept").read_bytes() == b"old"
    assert len(list(open_folder.iterdir())) == 1


def write_many(path: Path, text: bytes) -> None:
    from fsteer_lens.ground.files import write_atomically

    for _ in range(60):
        write_atomically(path, text * 10_000)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_of_two_writers_of_one_file_one_wins_whole(tmp_path: Path) -> None:
    path, start = tmp_path / "file", multiprocessing.get_context("fork")
    path.write_bytes(b"a" * 10_000)
    writers = [start.Process(target=write_many, args=(path, text)) for text in (b"a", b"b")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which do nothing here
        for writer in writers:
            writer.start()
    while any(writer.is_alive() for writer in writers):
        assert set(path.read_bytes()) in ({ord("a")}, {ord("b")}) and path.stat().st_size == 10_000
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0] and len(list(tmp_path.iterdir())) == 1


class Rows(torch.utils.data.Dataset[list[int]]):
    """Activations of a file, row by row, as a training loop of one's own reads them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return fs.Activations.load(self.path).queries[index]


def test_workers_of_a_data_loader_read_activations(tutor_model: SteerableModel, tmp_path: Path) -> None:
    acts = fs.collect(tutor_model, tutor.data("safe").train[:8], layer=4, progress=False)
    acts.save(tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, as above
        rows = torch.cat(list(torch.utils.data.DataLoader(Rows(tmp_path / "a.safetensors"), 2, num_workers=2)))
    assert torch.equal(rows, acts.queries)
