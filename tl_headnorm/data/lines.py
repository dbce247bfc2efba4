"""Text files and their lines, with the place of each for an error."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_headnorm.errors import InputError, first_line


@dataclass(frozen=True)
class TextFile:
    """A file's text, its path and its SHA-256."""

    text: str
    path: Path
    sha256: str

    def lines(self) -> Iterator[tuple[str, str]]:
        """Every line that is not empty, with its file and number."""
        # Only "\n" ends a line: str.splitlines also cuts at U+2028 and its like, which may be
        # inside a prompt and, in JSON, inside a string.
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.strip():
                yield line.rstrip("\r"), f"{self.path}, line {number}"


def read_text(path: str | Path, setting: str, what: str) -> TextFile:
    """A UTF-8 file. Raises InputError in which `setting` expected `what`."""
    where = Path(path).expanduser()
    try:
        data = where.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{setting}: expected {what}, found {str(path)!r} ({first_line(error)}); check the path"
        ) from None
    return TextFile(text, where, hashlib.sha256(data).hexdigest())


def text_or_file(given: str, setting: str) -> str:
    """A setting's text, or that of the file it names."""
    try:
        named = Path(given).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or `~somebody`: a text
        named = False
    text = read_text(given, setting, "a text or a UTF-8 file").text if named else given
    if not text.strip():
        raise InputError(f"{setting}: expected a text, found none in {given!r}")
    return text


def json_of(line: str, at: str) -> Any:
    """The JSON value of a line. Raises InputError for a fault, or text that is not Unicode."""
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{at}: expected Unicode text, found half a surrogate pair "
            f"({error.object[error.start]!r})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{at}: expected JSON, found a fault ({first_line(error)})") from None
    return value
