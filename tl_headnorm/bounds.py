"""Bounds of settings, declared once, in a field's type: `batch_size: Count = 8`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from tl_headnorm.errors import InputError, unknown


@dataclass(frozen=True)
class Bound:
    """A test of a value, what is expected in words, and what to do about it."""

    holds: Callable[[Any], object]
    expected: str
    advice: str = "set --{name} to {expected}"

    def __repr__(self) -> str:
        """As --help shows it, behind the type."""
        return self.expected

    def check(self, name: str, value: Any) -> None:
        """Raise InputError unless the value holds; NaN never does."""
        if not self.holds(value):
            found = list(value) if isinstance(value, tuple) else value
            advice = self.advice.format(name=name, expected=self.expected)
            raise InputError(f"{name}: expected {self.expected}, found {found!r}; {advice}")


@dataclass(frozen=True)
class OneOf:
    """Bound of names, by commas or in a list: each is among the choices, and one is there."""

    kind: str
    choices: tuple[str, ...]

    def __repr__(self) -> str:
        return f"of {', '.join(self.choices)}"

    def check(self, name: str, value: Any) -> None:
        """Raise InputError for no name, and for another one, with the nearest choice."""
        names = by_commas(value)
        if not names:
            raise InputError(f"{name}: expected one of {', '.join(self.choices)}, found none")
        for one in names:
            if one not in self.choices:
                raise unknown(self.kind, one, self.choices)


def by_commas(value: str | Sequence[str]) -> tuple[str, ...]:
    """The parts of a text, or of several, between commas, each once."""
    texts = [value] if isinstance(value, str) else value
    parts = (part.strip() for text in texts for part in text.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def at_least(least: int) -> Bound:
    """A number of `least` or more."""
    return Bound(lambda value: value >= least, f"{least} or more")


Count = Annotated[int, at_least(1)]
CountFrom0 = Annotated[int, at_least(0)]
Size = Annotated[float, at_least(0)]
TextLength = Annotated[int, at_least(3)]
Fraction = Annotated[float, Bound(lambda value: 0 < value < 1, "a share between 0 and 1")]
_plain = Bound(
    lambda name: name and "/" not in name, "a name without '/'",
    "use --output_dir to choose the folder",
)  # fmt: skip
# The run directory is the last line of stdout: it must be one line.
_one_line = Bound(lambda text: len(text.splitlines()) < 2, "one line")
DirName = Annotated[str, _plain, _one_line]
OneLine = Annotated[str, _one_line]


def bounds_of(hint: object) -> Iterator[Bound | OneOf]:
    """Every bound in a type, whatever it is nested in."""
    if isinstance(hint, (Bound, OneOf)):
        yield hint
    for part in get_args(hint):
        yield from bounds_of(part)


def check_values(settings: type, values: Mapping[str, object]) -> None:
    """Raise InputError unless each value keeps the bounds in its field's type.

    Refused everywhere: null where the type has no None (jsonargparse lets YAML's null pass), and
    text that no file can hold (NUL, bytes that are no UTF-8).
    """
    for field in fields(settings):
        name, value = field.name, values.get(field.name, ...)
        if value is None and NoneType not in get_args(field.type):
            raise InputError(f"{name}: expected a value, found null; give one or leave the key out")
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
                raise InputError(f"{name}: expected text in UTF-8 without NUL, found {text!r}")
        if value not in (None, ...):
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise unknown(name, value, get_args(field.type))
            for bound in bounds_of(field.type):
                bound.check(name, value)


@dataclass(frozen=True)
class Checked:
    """A frozen record that checks its fields against the bounds in their types when it is made."""

    # Settings that do nothing without another one.
    needs: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        check_values(type(self), vars(self))
        for name, other in self.needs.items():
            if getattr(self, name) not in (None, False) and not getattr(self, other):
                raise InputError(f"{name}: expected --{other} with it, found none; add --{other}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The settings that a command line and a YAML file may give."""
        return tuple(field.name for field in fields(cls))
