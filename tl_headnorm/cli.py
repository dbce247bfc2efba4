"""One subcommand per job. Heavy imports stay inside the commands, so that --help is quick."""

import errno
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, get_args

from tl_headnorm.commands.table import COMMANDS
from tl_headnorm.errors import InputError, first_line, nearest, unknown
from tl_headnorm.run.launch import processes
from tl_headnorm.run.resume import resumed
from tl_headnorm.settings import check_config

_UNKNOWN = re.compile(r"does not accept option '([\w.]+)'|unrecognized arguments: (-*)([^=\s]+)")
_WRONG_TYPE = re.compile(r'Parser key "([\w.]+)":? (?:Expected a (.+?)\. Got value: (.*)|(.*))')
_NONE_FITS = re.compile(r"Union subtypes Subtypes: (.*) Given value: (.*)")
BAD_INPUT, INTERRUPTED = 2, 130
Together = Callable[[Callable[[], Any]], Any]


def build_parser() -> Any:
    """The whole command line; flags, YAML keys, types and help come from the settings' classes."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="tl-headnorm",
        description="What every attention head of a language model does over a dataset.",
        epilog="tl-headnorm COMMAND --help lists the settings of a command.",
        exit_on_error=False,
        allow_abbrev=False,  # of commands too: --max_sample is a slip, not --max_samples
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        given = f"{command.metavar} ... " if command.positional else ""
        usage = f"tl-headnorm {name} {given}[--SETTING VALUE ...]"
        sub = ArgumentParser(usage=usage, description=command.help, exit_on_error=False)
        sub.add_argument("--config", action="config", help="YAML file with settings (same keys).")
        skip = {*command.skip, *([command.positional] if command.positional else [])}
        sub.add_class_arguments(command.settings, as_group=False, skip=skip)
        if command.positional:
            what = "Run directories." if command.metavar == "DIR" else "What to get."
            sub.add_argument(command.positional, nargs="*", metavar=command.metavar, help=what)
        commands.add_subcommand(name, sub, help=command.help)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. No traceback without --debug."""
    try:
        if processes() == 1:  # before anything of torch is loaded
            return _main(arguments, lambda work: work())[0]
        from tl_headnorm.run import ranks

        together = ranks.ranks().together
    except InputError as error:  # a launcher's environment that leads nowhere
        print(f"tl-headnorm: {error}", file=sys.stderr)
        return BAD_INPUT
    code, cause = _main(arguments, together)
    ranks.leave(cause)
    return code


def _main(arguments: Sequence[str], together: Together) -> tuple[int, BaseException | None]:
    """The exit code, and the error it stands for; `together` is done by all processes alike."""
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
    """What to tell of an error that the input or the machine is to blame for; else None."""
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


def parse(arguments: list[str]) -> tuple[str, Any]:
    """(command, its settings). Raises InputError in one line for whatever does not fit."""
    _check_command(arguments)
    if arguments[0] in COMMANDS:
        arguments = _with_true(arguments)
        for path in _config_files(arguments):
            check_config(path, _names(arguments[0]))
    parser = build_parser()
    try:
        namespace = parser.parse_args(arguments)
        name = namespace.subcommand
        values = namespace[name].as_dict()
        values.pop("config", None)
        _refuse_null(name, values)
        _refuse_unwritable(values)
        if values.get("resume") is not None:
            given = parser.parse_args(arguments, defaults=False)[name].as_dict()
            given.pop("config", None)
            return name, resumed(values["resume"], given)
        return name, COMMANDS[name].settings(**values)
    except Exception as error:  # argparse's and jsonargparse's own, and those of the YAML reader
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise _usage_error(error, arguments) from None


def _names(command: str) -> list[str]:
    return COMMANDS[command].names


def _refuse_null(command: str, values: dict[str, Any]) -> None:
    """jsonargparse lets YAML's null pass for any type."""
    for field in fields(COMMANDS[command].settings):
        if values.get(field.name, ...) is None and type(None) not in get_args(field.type):
            raise InputError(
                f"{field.name}: expected a value, found null; give one or leave the key out"
            )


def _refuse_unwritable(values: dict[str, Any]) -> None:
    """Text that no file name and no file can hold: NUL, and bytes that are no UTF-8."""
    for name, value in values.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
                raise InputError(f"{name}: expected text in UTF-8 without NUL, found {text!r}")
            # The directory is the last line of stdout: it must be one line.
            if name in ("output_dir", "experiment_name") and len(str(text).splitlines()) > 1:
                raise InputError(f"{name}: expected one line, found {text!r}")


def _check_command(arguments: list[str]) -> None:
    if not arguments:
        raise InputError(f"expected a command: {', '.join(COMMANDS)}; see tl-headnorm --help")
    first = arguments[0]
    if first in COMMANDS or first in ("-h", "--help"):
        return
    if first.startswith("-"):
        raise InputError(
            f"expected a command before the settings ({', '.join(COMMANDS)}), found {first!r}; "
            "see tl-headnorm --help"
        )
    raise unknown("command", first, COMMANDS)


def _with_true(arguments: list[str]) -> list[str]:
    """`--debug` alone means `--debug=true`, likewise for every setting that is true or false."""
    command, rest = arguments[0], arguments[1:]
    switches = {
        f"--{f.name}" for f in fields(COMMANDS[command].settings) if f.type in (bool, "bool")
    }
    ends = [*rest[1:], "--"]
    return [command] + [
        f"{a}=true" if a in switches and after.startswith("-") else a
        for a, after in zip(rest, ends, strict=False)
    ]


def _config_files(arguments: list[str]) -> list[str]:
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [after if a == "--config" else a.partition("=")[2]
             for a, after in pairs if a == "--config" or a.startswith("--config=")]  # fmt: skip
    return [path for path in given if path]


def _usage_error(error: Exception, arguments: list[str]) -> InputError:
    """jsonargparse's complaint in one line of ours, with the nearest setting's name."""
    text = " ".join(str(error).split())
    see = f"; see tl-headnorm {arguments[0]} --help"
    if match := _UNKNOWN.search(text):
        key = match.group(1) or match.group(3)
        if match.group(1) or match.group(2):
            known = [*_names(arguments[0]), "config"]
            return InputError(f"unknown setting {key!r}{nearest(key, known)}{see}")
        return InputError(f"expected settings as --name value, found {key!r}{see}")
    if match := _WRONG_TYPE.search(text):
        key, kind, value, other = match.groups()
        if kind:
            return InputError(f"{key}: expected {_kind(kind)}, found {value}{see}")
        if union := _NONE_FITS.search(other):
            return InputError(
                f"{key}: expected {_kind(union.group(1))}, found {union.group(2)}{see}"
            )
        text = f"{key}: {other}"
    if len(text) > 300:
        text = first_line(error)
    return InputError(f"{text}{see}")


def _kind(kind: str) -> str:
    """A type as jsonargparse prints it, in words."""
    if literal := re.search(r"Literal\[([^\]]*)\]", kind):
        words = "one of " + ", ".join(re.findall(r"'([^']*)'", literal.group(1)))
        return f"{words} or a whole number" if "'int'" in kind else words
    name = kind.removeprefix("<class '").removesuffix("'>")
    known = {"int": "a whole number", "bool": "true or false", "float": "a number",
             "tuple": "a list such as [4, 5]", "str": "text"}  # fmt: skip
    return known.get(name, name)
