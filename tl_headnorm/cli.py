"""One subcommand per job. Heavy imports stay inside the commands, so that --help is quick."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tl_headnorm.config import Settings
from tl_headnorm.errors import InputError, first_line, nearest

_UNKNOWN_SETTING = re.compile(
    r"does not accept option '([^']+)'|unrecognized arguments: -*([^=\s]+)"
)
DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """A subcommand: its help line, its settings' class, and what runs it (returns an exit code)."""

    help: str
    settings: type
    run: Callable[[Any], int]


def _collect(settings: Settings) -> int:
    from tl_headnorm.jobs import run_collect

    print(run_collect(settings))
    return DONE


def _validate(settings: Settings) -> int:
    from tl_headnorm.jobs import run_validate

    path, passed = run_validate(settings)
    print(path)
    return DONE if passed else CHECK_FAILED


COMMANDS: dict[str, Command] = {
    "collect": Command(
        "Measure every head over a dataset and write a run directory.", Settings, _collect
    ),
    "validate": Command(
        "Compare the same numbers with Hugging Face's own forward.", Settings, _validate
    ),
}


def build_parser() -> Any:
    """The whole command line; flags, YAML keys, types and help come from the settings' classes."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="tl-headnorm",
        description="What every attention head of a language model does over a dataset.",
        epilog="tl-headnorm COMMAND --help lists the settings of a command.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.help, exit_on_error=False)
        sub.add_argument("--config", action="config", help="YAML file with settings (same keys).")
        sub.add_class_arguments(command.settings, as_group=False)
        commands.add_subcommand(name, sub, help=command.help)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. No traceback without --debug."""
    debug = "--debug" in arguments or "--debug=true" in arguments
    try:
        name, settings = parse(list(arguments))
        debug = debug or bool(getattr(settings, "debug", False))
        return COMMANDS[name].run(settings)
    except SystemExit as stop:  # --help, --print_config
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:
        if debug:
            traceback.print_exc()
        print(f"tl-headnorm: {error}", file=sys.stderr)
        return BAD_INPUT


def parse(arguments: list[str]) -> tuple[str, Any]:
    """(command, its settings). Raises InputError in one line for whatever does not fit."""
    _check_command(arguments)
    parser = build_parser()
    try:
        namespace = parser.parse_args(arguments)
    except InputError:
        raise
    except Exception as error:  # argparse's and jsonargparse's own, and those of the YAML reader
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise _usage_error(error, arguments) from None
    name = namespace.subcommand
    values = namespace[name].as_dict()
    values.pop("config", None)
    return name, COMMANDS[name].settings(**values)


def _check_command(arguments: list[str]) -> None:
    if not arguments:
        raise InputError(f"expected a command: {', '.join(COMMANDS)}; see tl-headnorm --help")
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise InputError(
            f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)} "
            f"Expected one of: {', '.join(COMMANDS)}"
        )


def _usage_error(error: Exception, arguments: list[str]) -> InputError:
    """jsonargparse's complaint in one line, with the nearest setting's name."""
    text = " ".join(str(error).split())
    unknown = re.search(
        r"does not accept option '([\w.]+)'|unrecognized arguments: -*([\w.]+)", text
    )
    command = COMMANDS.get(arguments[0])
    if unknown and command is not None:
        key = unknown.group(1) or unknown.group(2)
        known = [*command.settings.__dataclass_fields__, "config"]  # type: ignore[attr-defined]
        return InputError(
            f"unknown setting {key!r}{nearest(key, known)}; see tl-headnorm {arguments[0]} --help"
        )
    if len(text) > 300:
        text = first_line(error)
    return InputError(f"{text}; see tl-headnorm {arguments[0]} --help")
