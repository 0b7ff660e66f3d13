"""Files are written whole or not at all, and read as text or not at all."""

import gzip
import os
from pathlib import Path

import pytest

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground import files
from fsteer_lens.ground.files import path_of, read_bytes, read_text, write_atomically
from fsteer_lens.ground.tables import read_jsonl


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
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt, match=r"disk full|^$"):
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
    with pytest.raises(DataError, match="expected an ordinary file, got a folder"):
        read_text(Path(tmp_path))
    path = tmp_path / "latin"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_text(path)


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    target, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(target)
    for data in (b"new", b"newer"):
        write_atomically(link, data)
        assert link.is_symlink() and target.read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_what_is_no_ordinary_file_is_neither_replaced_nor_read(tmp_path):
    pipe, circle = tmp_path / "pipe", tmp_path / "circle"
    os.mkfifo(pipe)
    circle.symlink_to(circle)
    for path in (pipe, circle, Path("/dev/null")):
        with pytest.raises(InputError, match="expected an ordinary file, got a device, a pipe or a link to itself"):
            write_atomically(path, b"x")
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(DataError, match="expected an ordinary file, got a folder, a device or a pipe"):
            read_bytes(path)
    with pytest.raises(DataError, match=r"expected a readable file, got .*symbolic link"):
        read_bytes(circle)
    assert pipe.is_fifo() and circle.is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("path", [None, 3, b"a", "a\0b"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError, match=r"path: expected a text or a pathlib.Path, without NUL, got"):
        path_of(path)


def test_a_name_may_be_as_long_as_the_system_allows_and_no_longer(tmp_path):
    write_atomically(tmp_path / ("a" * 255), b"x")
    with pytest.raises(InputError, match=r"expected a folder with room that may be written to, got .*too long"):
        write_atomically(tmp_path / ("a" * 256), b"x")
    with pytest.raises(InputError, match="cannot write /: expected a file, got a folder"):
        write_atomically("/", b"x")
    assert len(list(tmp_path.iterdir())) == 1


def test_packed_text_is_unpacked_and_a_bomb_is_not(tmp_path, monkeypatch):
    text = "naïve ☃\n" * 100
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_text(tmp_path / "a.txt.gz") == text
    monkeypatch.setattr(files, "UNPACKED", 1000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2**20)))
    with pytest.raises(DataError, match="expected at most 0 MiB when unpacked, got more"):
        read_text(tmp_path / "bomb.gz")
    monkeypatch.setattr(files, "RATIO", 10_000)  # the control: it is the ratio that refuses
    assert len(read_text(tmp_path / "bomb.gz")) == 2**20
    (tmp_path / "cut.gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(DataError, match="expected a readable UTF-8 text file"):
        read_text(tmp_path / "cut.gz")


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2, 3]\n")
    assert read_jsonl(path)[0][1] == [1, 2, 3]
    monkeypatch.setattr("fsteer_lens.ground.tables.MOST_JSON", 8)
    with pytest.raises(DataError, match=r"a.jsonl, line 1: expected JSON, of at most 8 characters, got 9"):
        read_jsonl(path)
    with path.open("wb") as file:  # one that says it is large and takes no room
        file.truncate(files.MOST_TEXT + 1)
    with pytest.raises(DataError, match="expected at most 2,048 MiB, got 2,147,483,649 bytes"):
        read_text(path)
