"""Reading text and writing files so that nothing is ever half-written."""

import os
from pathlib import Path
from uuid import uuid4

from fsteer_lens.errors import DataError, InputError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and rename it, so that `path` is never half-written.

    Raises:
        InputError: the folder does not exist, `path` is a folder, or writing there is not allowed.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(
            f"cannot write {target}", expected="an existing folder", got=str(target.parent), fix="Make it."
        )
    if target.is_dir():
        raise InputError(f"cannot write {target}", expected="a file", got="a folder", fix="Name a file in it.")
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
    except PermissionError as error:
        raise InputError(
            f"cannot write {target}", expected="a folder that may be written to", got=str(error)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_once(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write `data` to a file that does not exist yet; whether it was this call that did.

    Of several processes that do it at the same moment one wins, and nobody ever sees a part of the file.

    Raises:
        InputError: writing there is not allowed, or the file system has no hard links, by which it is done.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        write_atomically(temporary, data)
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(
            f"cannot write {target}", expected="a folder that may be written to and takes hard links", got=str(error)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: no such file, or not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}", expected="an existing file", got="none", fix="Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}", expected="a readable UTF-8 text file", got=str(error)) from error
