"""Reading text and writing files so that nothing is ever half-written."""

import os
import tempfile
from pathlib import Path

from fsteer_lens.errors import DataError, InputError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and rename it, so that `path` is never half-written."""
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}", expected="an existing folder", got=str(target.parent))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
