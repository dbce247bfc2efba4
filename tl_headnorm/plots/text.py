"""Names and samples' text in figures: shown as they are, whatever they spell."""

import html


def on_page(text: object) -> str:
    """For plotly, which reads HTML: `<b>` shows as those three characters."""
    return html.escape(str(text), quote=False)


def in_picture(text: object) -> str:
    """For matplotlib, which reads TeX between two dollar signs."""
    return str(text).replace("$", r"\$")
