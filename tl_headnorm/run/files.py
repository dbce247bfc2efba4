"""Files that are either whole or not there, and a lock on a folder."""

import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tl_headnorm.errors import InputError


def write_with(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Where that fails no temporary file is left, and what stood at `path` before still does. An
    OSError says which file it is about.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # a directory that cannot be written to any more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    write_with(path, lambda stream: stream.write(data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Strict JSON: NaN becomes null, numpy's numbers become plain ones."""
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def plain(data: Any) -> Any:
    """Only dicts, lists, text, numbers, booleans and None."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set)):
        return [plain(value) for value in data]
    if hasattr(data, "tolist"):  # numpy's arrays and numbers
        return plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if data is None or isinstance(data, (str, int, float, bool)) else str(data)


@contextmanager
def locked(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold the run's lock, which ends with the process however it ends.

    `alone`: raise InputError where any process still works on the run. Where the file system
    knows no locks there is none.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if alone:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise InputError(
                    f"resume: expected a run that no process works on, found {folder.parent} in "
                    "use; wait for its end, or stop it"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)
