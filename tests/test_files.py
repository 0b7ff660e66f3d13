"""Files are written whole or not at all, and read as text or not at all."""

import os
from pathlib import Path

import pytest

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.files import read_text, write_atomically


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"one", b"", b"\x00\xff" * 100_000):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("failing", "existed"),
    [
        ("os.fsync", True),
        ("os.fsync", False),
        ("pathlib.Path.replace", True),
        ("pathlib.Path.replace", False),
        ("pathlib.Path.chmod", True),  # the permissions of a file that is replaced are kept
    ],
)
def test_what_fails_while_writing_leaves_the_old_file_whole_and_nothing_else(
    tmp_path, monkeypatch, failing, error, existed
):
    path = tmp_path / "a.bin"
    if existed:
        path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new" * 1000)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["a.bin"] if existed else [])
    if existed:
        assert path.read_bytes() == b"old"


def test_a_reader_never_meets_a_half_written_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    seen = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(path.read_bytes()), original(handle)))
    write_atomically(path, b"new" * 1000)
    assert seen == [b"old"] and path.read_bytes() == b"new" * 1000


def test_permissions_are_those_of_the_file_before(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*a\.bin: expected an existing folder, got .*nowhere"):
        write_atomically(tmp_path / "nowhere" / "a.bin", b"x")


def test_text_is_read_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text("naïve ☃", encoding=encoding)
        assert read_text(path) == read_text(str(path)) == "naïve ☃"


def test_what_is_no_text_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected an existing file, got none\. Check the path"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a readable UTF-8 text file"):
        read_text(Path(tmp_path))
    path = tmp_path / "latin"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_text(path)
