"""Names and samples' text in figures: as they are, in any script, whatever they spell."""

import html
import textwrap
import unicodedata
from functools import cache

Number = float | int
# Tried in this order for what the first cannot write.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS", "Noto Emoji",
    "Symbola", "Segoe UI Symbol",
)  # fmt: skip


def on_page(text: object) -> str:
    """For plotly, which reads HTML: `<b>` shows as those three characters, a line end as one."""
    return html.escape(str(text), quote=False).replace("\n", "<br>")


def wrapped(text: str, width: Number, size: Number) -> list[str]:
    """Lines of at most `width`, in the unit of the font `size`."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text) / max(1, len(text))
    most = max(8, int(width / (size * (0.57 + 0.5 * wide))))
    return [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(part, most, break_on_hyphens=False)
    ]


@cache
def _fonts() -> dict[str, frozenset[int]]:
    """The fonts installed here, and the characters each can write."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    here = {font.name for font in fontManager.ttflist}
    return {
        name: frozenset(get_font(fontManager.findfont(FontProperties(family=name))).get_charmap())
        for name in FONTS
        if name in here
    }


def families() -> list[str]:
    """Font families for text of any script."""
    return list(_fonts())


def drawable(text: str) -> str:
    """The text with every character that no font here can write as its code, U+1F642."""
    known = frozenset().union(*_fonts().values())
    return "".join(c if c == "\n" or ord(c) in known else f"U+{ord(c):04X}" for c in text)


def token_label(token: str, most: int = 14) -> str:
    """A token as a label of one line: spaces and line ends made visible, long ones cut."""
    text = token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    inner = text.strip(" ")
    left, right = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    text = drawable("·" * left + inner + "·" * (right if inner else 0))
    return text if len(text) <= most else text[: most - 1] + "…"
