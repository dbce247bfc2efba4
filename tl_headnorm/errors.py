"""The one exception a user is meant to see, and the spelling help that goes with it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad usage or bad input: one line saying what was expected, what was found, what to do.

    The command line prints it without a traceback and exits 2.
    """

    def __init__(self, message: str) -> None:
        text = printable(" ".join(str(message).split()))
        # The value found may be a file's text: its ends, and the advice, are enough.
        super().__init__(text if len(text) <= 1200 else f"{text[:900]} ... {text[-250:]}")


def printable(text: str) -> str:
    """Unprintable characters as escapes: names come from files and could steer the terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def nearest(name: object, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the most similar of `choices`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: object, choices: Iterable[str]) -> InputError:
    """The error for a name that is in none of `choices`."""
    known = sorted(choices)
    hint = nearest(name, known) or "."
    return InputError(f"unknown {kind} {name!r}{hint} Expected one of: {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
