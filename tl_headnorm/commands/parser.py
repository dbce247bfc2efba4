"""From the command line and YAML to settings, or one line saying what does not fit."""

import re
from argparse import Action
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from tl_headnorm.bounds import Checked, check_values
from tl_headnorm.commands.table import COMMANDS, Command
from tl_headnorm.errors import InputError, first_line, nearest, unknown
from tl_headnorm.run.resume import resumed

_UNKNOWN = re.compile(
    r"does not accept option '([\w.]+)'|(?:U|u)nrecognized arguments: (-*)([^=\s]+)"
)
_WRONG_TYPE = re.compile(r'Parser key "([\w.]+)":? (?:Expected a (.+?)\. Got value: (.*)|(.*))')
_NONE_FITS = re.compile(r"Union subtypes Subtypes: (.*) Given value: (.*)")
_ANNOTATED = re.compile(r"Annotated\[((?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])+?), ([^\[\]]+)\]")


class _Help(DefaultHelpFormatter):
    """Types as they read: `int, 1 or more` for `Annotated[int, 1 or more]`."""

    def _get_type_str(self, action: Action) -> str | None:
        action_type, action.type = action.type, None
        try:
            return _ANNOTATED.sub(r"\1, \2", super()._get_type_str(action) or "") or None
        finally:
            action.type = action_type


class _ConfigFile(ActionConfigFile):
    """--config FILE, whose keys must be known and unique."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        if values:
            check_config(values, [a.dest for a in parser._actions if a is not self])
        super().__call__(parser, cfg, values, option_string)


def build_parser() -> ArgumentParser:
    """Parser of all commands; flags, YAML keys, types and help come from the settings' classes."""
    parser = ArgumentParser(
        prog="tl-headnorm",
        description="What every attention head of a language model does over a dataset.",
        epilog="tl-headnorm COMMAND --help lists the settings of a command.",
        exit_on_error=False,
        formatter_class=_Help,
        allow_abbrev=False,  # of commands too: --max_sample is a slip, not --max_samples
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, _parser_of(command), help=command.help)
    return parser


def _parser_of(command: Command) -> ArgumentParser:
    given = f"{command.metavar} ... " if command.positional else ""
    parser = ArgumentParser(
        usage=f"tl-headnorm {command.name} {given}[--SETTING VALUE ...]",
        description=command.help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with settings (same keys).")
    settings = command.settings
    hints = {field.name: field.type for field in fields(settings)}
    own = {*settings.setting_names()} - {command.positional}
    parser.add_class_arguments(settings, as_group=False, skip={*hints} - own)
    for action in parser._actions:
        hint = hints.get(action.dest)
        if hint is bool:  # --debug alone is --debug true
            action.nargs, action.const = "?", True
        elif _is_list(hint):
            action.type = _bracketed
    if command.positional:
        what = "Run directories." if command.metavar == "DIR" else "What to get."
        parser.add_argument(command.positional, nargs="*", metavar=command.metavar, help=what)
    return parser


def _is_list(hint: Any) -> bool:
    """Whether a type is a list or tuple, where text alone is none."""
    parts = get_args(hint)
    return get_origin(hint) in (list, tuple) or (str not in parts and any(map(_is_list, parts)))


def _bracketed(text: str) -> str:
    """A list by commas as YAML writes it."""
    return text if text.startswith(("[", "null")) else f"[{text}]"


def parse(arguments: list[str]) -> tuple[str, Checked]:
    """(command, its settings). Raises InputError in one line for whatever does not fit."""
    _check_command(arguments)
    parser = build_parser()
    try:
        namespace = parser.parse_args(arguments)
        name = namespace.subcommand
        values = namespace[name].as_dict()
        values.pop("config", None)
        check_values(COMMANDS[name].settings, values)
        if values.get("resume") is not None:
            given = parser.parse_args(arguments, defaults=False)[name].as_dict()
            given.pop("config", None)
            return name, resumed(values["resume"], given, COMMANDS[name].settings, name)
        return name, COMMANDS[name].settings(**values)
    except Exception as error:  # argparse's and jsonargparse's own, and those of the YAML reader
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise _usage_error(error, arguments) from None


def _check_command(arguments: list[str]) -> None:
    names = ", ".join(COMMANDS)
    if not arguments:
        raise InputError(f"expected a command: {names}; see tl-headnorm --help")
    first = arguments[0]
    if first in COMMANDS or first in ("-h", "--help"):
        return
    if first.startswith("-"):
        raise InputError(
            f"expected a command before the settings ({names}), found {first!r}; see tl-headnorm "
            "--help"
        )
    raise unknown("command", first, COMMANDS)


def check_config(path: str | Path, known: Collection[str]) -> None:
    """Raise InputError unless a YAML file is a mapping with each key known and given once.

    YAML itself lets a repeated key silently win, so a run would not be the one that was read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            yaml.safe_load(text)  # reports the line of a tag that is no plain value
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"config: expected a YAML file with settings, found {path} ({first_line(error)}); "
            "check the path"
        ) from None
    except RecursionError:
        raise InputError(
            f"{path}: expected YAML, found a fault (nested too deeply); mend it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", first_line(error))
        raise InputError(f"{where}: expected YAML, found a fault ({problem}); mend it") from None
    if not isinstance(root, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "plain text"}
        found = kinds.get(type(root), "an empty file")
        raise InputError(f"{path}: expected settings as lines 'key: value', found {found}")
    first: dict[str, int] = {}
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in first:
            raise InputError(
                f"{path}, line {line}: expected each setting once, found {key!r} again (first on "
                f"line {first[key]}); keep one"
            )
        if key not in known:
            raise InputError(f"{path}, line {line}: unknown setting {key!r}{nearest(key, known)}")
        first[key] = line


def _usage_error(error: Exception, arguments: list[str]) -> InputError:
    """jsonargparse's complaint in one line of ours, with the nearest setting's name."""
    text = " ".join(str(error).split())
    see = f"; see tl-headnorm {arguments[0]} --help"
    if match := _UNKNOWN.search(text):
        key = match.group(1) or match.group(3)
        if match.group(1) or match.group(2):
            known = [*COMMANDS[arguments[0]].settings.setting_names(), "config"]
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
