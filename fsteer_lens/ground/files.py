"""Reading files that people give and writing others so that nothing is ever half-written.

What is no ordinary file (a device, a pipe) is neither read nor replaced: reading one may never end.
"""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import brief

MOST_TEXT: Final = 2**31
"""Bytes of text that are read: a table of ten million prompts is smaller."""
UNPACKED: Final = 2**28
"""Bytes that any packed file may unpack to; a larger one to `RATIO` times its size. JSON is packed to a tenth."""
RATIO: Final = 50


def path_of(path: Any) -> Path:
    """The path that was given, or `InputError` where it cannot be one."""
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise InputError("path", expected="a text or a pathlib.Path, without NUL", got=brief(path))
    return Path(path)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and rename it, so that `path` is never half-written.

    A link stays a link: what it leads to is written. A second name of the same file (a hard link) keeps what it holds.

    Raises:
        InputError: the folder does not exist, `path` is a folder, a device or a pipe, or writing there is not allowed
            or not possible.
    """
    target = Path(os.path.realpath(path_of(path)))
    try:
        mode = mode_of(target)
        with _written_beside(target, data) as temporary:
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error


@contextmanager
def _written_beside(target: Path, data: bytes) -> Iterator[Path]:
    """A file beside another one that holds the data, all of them on the disk; it is gone afterwards."""
    temporary = target.parent / f".fsteer_lens.{uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_folder(path: Path) -> None:
    """Make a folder and those it lies in where they are missing, or raise `InputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {path}", expected="a place where one can be", got=str(error)
        ) from error


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` where a file cannot be written, so that this is found out before there is one to write."""
    target = Path(os.path.realpath(path_of(path)))
    try:
        mode_of(target)
    except OSError as error:
        raise unwritable(target, error) from error


def mode_of(target: Path) -> int | None:
    """Permissions of a file that may be written to, None where there is none yet.

    Raises:
        InputError: no such folder, a folder, a device or a pipe, or no leave to write.
        OSError: it cannot be looked at.
    """
    problem = f"cannot write {target}"
    if not target.parent.is_dir():
        raise InputError(problem, expected="an existing folder", got=str(target.parent), fix="Make it.")
    if target.is_dir():
        raise InputError(problem, expected="a file", got="a folder", fix="Name a file in it.")
    if not os.path.lexists(target):
        return None
    mode = target.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise InputError(problem, expected="an ordinary file", got="a device, a pipe or a link to itself")
    if not os.access(target, os.W_OK):
        raise InputError(problem, expected="a file that may be written to", got="one that is read-only")
    return stat.S_IMODE(mode)


def unwritable(target: Path, error: OSError) -> InputError:
    """What is said where the system does not let a file be written."""
    return InputError(f"cannot write {target}", expected="a folder with room that may be written to", got=str(error))


def read_bytes(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """What an ordinary file of at most so many bytes holds.

    Raises:
        DataError: no such file, no ordinary one, a larger one, or one that cannot be read.
    """
    given = path_of(path)
    try:
        found = given.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}", expected="an ordinary file", got="a folder, a device or a pipe")
        if most is not None and found.st_size > most:
            raise DataError(f"{path}", expected=f"at most {most / 2**20:,.0f} MiB", got=f"{found.st_size:,} bytes")
        return given.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}", expected="an existing file", got="none", fix="Check the path.") from error
    except OSError as error:
        raise DataError(f"{path}", expected="a readable file", got=str(error)) from error


def write_once(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write `data` to a file that does not exist yet; whether it was this call that did.

    Of several processes that do it at the same moment one wins, and nobody ever sees a part of the file.

    Raises:
        InputError: writing there is not allowed, or the file system has no hard links, by which it is done.
    """
    target = path_of(path)
    try:
        with _written_beside(target, data) as temporary:
            os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(
            f"cannot write {target}", expected="a folder that may be written to and takes hard links", got=str(error)
        ) from error
    return True


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8 text: any byte order mark left out, line ends as in Python, unpacked where the name ends in .gz.

    Raises:
        DataError: no such file, not UTF-8 text, more than 2 GiB of it, or a packed file that unpacks to more than 256
            MiB and fifty times its size.
    """
    content = read_bytes(path, MOST_TEXT)
    try:
        text = (_unpacked(path, content) if path_of(path).suffix == ".gz" else content).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}", expected="a readable UTF-8 text file", got=str(error)) from error


def _unpacked(path: str | os.PathLike[str], content: bytes) -> bytes:
    most = min(MOST_TEXT, max(UNPACKED, RATIO * len(content)))
    with gzip.open(io.BytesIO(content)) as packed:
        found = packed.read(most + 1)
    if len(found) > most:
        raise DataError(f"{path}", expected=f"at most {most / 2**20:,.0f} MiB when unpacked", got="more")
    return found
