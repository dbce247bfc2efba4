"""One subcommand per job. Heavy imports stay inside the commands, so that --help is quick."""

import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tl_headnorm.commands.parser import parse
from tl_headnorm.commands.table import COMMANDS
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run import ranks

BAD_INPUT, INTERRUPTED = 2, 130
Together = Callable[[Callable[[], Any]], Any]


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. No traceback without --debug."""
    try:
        together = ranks.connect().agree  # loads torch only where there are several
    except InputError as error:  # a launcher's environment that leads nowhere
        print(f"tl-headnorm: {error}", file=sys.stderr)
        return BAD_INPUT
    code, cause = _main(arguments, together)
    ranks.disconnect(cause)
    return code


def _main(arguments: Sequence[str], together: Together) -> tuple[int, BaseException | None]:
    """The exit code and its error; `together` runs a function on all processes."""
    debug = "--debug" in arguments or "--debug=true" in arguments
    try:
        name, settings = together(lambda: parse(list(arguments)))
        debug = debug or bool(getattr(settings, "debug", False))
        return COMMANDS[name].run(settings, together), None
    except SystemExit as stop:  # --help, --print_config
        return int(stop.code or 0), None
    except KeyboardInterrupt as stop:
        message = getattr(stop, "message", "interrupted")
        if message:
            print(message, file=sys.stderr)
        return getattr(stop, "exit_code", INTERRUPTED), stop
    except Exception as error:
        line = _one_line(error)
        hint = getattr(error, "hint", "")
        if line is None:
            if hint:
                print(hint.removeprefix("; "), file=sys.stderr)
            raise
        if debug:
            traceback.print_exc()
        if not getattr(error, "quiet", False):
            print(f"tl-headnorm: {line}{hint}", file=sys.stderr, flush=True)
        return BAD_INPUT, error


def _one_line(error: Exception) -> str | None:
    """The user's line for bad input, full memory or disk; None for a fault of ours."""
    if isinstance(error, InputError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, not imported for --help's sake
        return (
            f"expected enough memory on the device, found none left ({first_line(error)}); lower "
            "--batch_size or --max_length"
        )
    if isinstance(error, OSError):
        room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return f"expected files that can be read and written, found {first_line(error)}" + (
            "; make room or choose another --output_dir (files written before are whole)"
            if room
            else ""
        )
    return None
