"""Jinja templates of the package: pages (`*.html.j2`, autoescaped) and summaries (`*.md.j2`)."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pandas.api.types import is_numeric_dtype

from tl_headnorm.run.files import plain

NO_VALUE = "–"
Number = float | np.floating | int | None


def render(template: str, /, **values: Any) -> str:
    """The template at a path in the package, such as `commands/ablate/summary.md.j2`, filled in."""
    return _environment().get_template(template).render(**values)


def script_json(data: Any) -> Markup:
    """JSON that cannot end or open anything inside a <script> element."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Half a surrogate pair, which a JSON file may hold, is no UTF-8; its escape is JSON.
    return Markup(text.encode("utf-8", "backslashreplace").decode("utf-8"))


@cache
def asset(path: str) -> Markup:
    """A stylesheet or script of the package, as it is."""
    return Markup((files("tl_headnorm") / path).read_text(encoding="utf-8"))


def number(value: Number, digits: int = 4, sign: str = "") -> str:
    """`digits` significant digits, trailing zeros included; a dash where there is no value."""
    if value is None or not np.isfinite(value):
        return NO_VALUE
    return f"{value:{sign}#.{digits}g}".rstrip(".").replace("-", "−")


def fixed(value: Number, digits: int = 3) -> str:
    """So many decimals; a dash where there is no value."""
    return NO_VALUE if value is None or np.isnan(value) else f"{value:.{digits}f}"


def general(value: Number, digits: int = 4) -> str:
    """At most `digits` significant digits, as `%g` prints them."""
    return NO_VALUE if value is None or np.isnan(value) else f"{value:.{digits}g}"


def signed(value: Number, digits: int = 3) -> str:
    """At most `digits` significant digits, + or - in front."""
    return NO_VALUE if value is None or np.isnan(value) else f"{value:+.{digits}g}"


def percent(value: Number, digits: int = 1) -> str:
    """A share from 0 to 1 in percent."""
    return NO_VALUE if value is None or np.isnan(value) else f"{value:.{digits}%}"


def interval(low: Number, high: Number, digits: int = 3) -> str:
    """Both ends with so many decimals: `0.123 to 0.456`."""
    return f"{fixed(low, digits)} to {fixed(high, digits)}"


def plural(count: int, word: str, many: str = "") -> str:
    """`1 head`, `1,024 heads`."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"


def formula(text: str) -> Markup:
    """`z_h` and `W_O^h` with subscripts and superscripts."""
    tags = {"_": "sub", "^": "sup"}
    return Markup(
        re.sub(r"([_^])(\w+)", lambda m: f"<{tags[m[1]]}>{m[2]}</{tags[m[1]]}>", str(escape(text)))
    )


def cell(value: Any, digits: int = 4) -> str:
    """A table's cell: floats with so many digits, a dash for none, no line ends."""
    if value is None or isinstance(value, (float, np.floating)):
        return general(value, digits)
    return " ".join(str(value).splitlines())


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table, numbers to the right; a bar in a text does not end its cell."""
    sides = ["right" if is_numeric_dtype(kind) else "left" for kind in table.dtypes]
    text = table.map(lambda value: cell(value).replace("|", "\\|"))
    return text.to_markdown(index=False, disable_numparse=True, colalign=sides)


def html_table(table: pd.DataFrame, classes: str = "figures") -> Markup:
    """An HTML table that scrolls sideways where it is wider than the page."""
    text = table.map(cell).to_html(index=False, border=0, justify="unset", classes=classes)
    return Markup('<div class="wide">{}</div>').format(Markup(text))


FILTERS = (markdown, html_table, number, fixed, general, signed, percent, interval, plural, formula)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tl_headnorm", "."),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update({function.__name__: function for function in FILTERS})
    environment.globals.update(asset=asset)
    return environment
