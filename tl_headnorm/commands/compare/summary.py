"""summary.md and compare.html of a comparison of two runs."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import xarray as xr

from tl_headnorm.commands.compare.plots import figure
from tl_headnorm.commands.compare.settings import CompareSettings
from tl_headnorm.plots.page import figure_html, plotly_library
from tl_headnorm.plots.plotly import draw
from tl_headnorm.plots.templates import general, render, signed

LONGEST = 120  # characters of a setting in the table of records


def summary(
    result: xr.Dataset, changed: Mapping[str, pd.DataFrame], settings: CompareSettings
) -> str:
    """summary.md."""
    return render("commands/compare/summary.md.j2", **_values(result, changed, settings))


def page(
    result: xr.Dataset, changed: Mapping[str, pd.DataFrame], settings: CompareSettings
) -> str:  # fmt: skip
    """compare.html, self-contained."""
    a, b = result.attrs["names"]
    figures = {
        name: figure_html(draw(figure(result, name, rows, settings.fdr)))
        for name, rows in changed.items()
    }
    return render(
        "commands/compare/page.html.j2",
        **_values(result, changed, settings),
        title=f"{b} compared to {a}",
        figures=figures,
        records=_differing(result.attrs),
        plotly=plotly_library(),
    )


def _values(
    result: xr.Dataset, changed: Mapping[str, pd.DataFrame], settings: CompareSettings
) -> dict[str, Any]:
    return {
        **result.attrs,
        "fdr": settings.fdr,
        "found": {name: _found(result, name, settings.fdr) for name in changed},
        "tables": {name: movers_text(rows) for name, rows in changed.items()},
    }


def _found(result: xr.Dataset, name: str, fdr: float) -> dict[str, Any]:
    """One measure: its formula, how many heads changed, and by more than a step of the dtype."""
    one, text = result.sel(measure=name), result.attrs["measures"][name]
    moved = one["difference"] != 0
    changed = (one["q"] <= fdr) & moved
    large = changed & (abs(one["difference"]) > text["step"] * abs(one["mean_a"]))
    counts = {"moved": bool(moved.any()), "changed": int(changed.sum()), "large": int(large.sum())}
    return {**text, **counts, "dtype": " and ".join(dict.fromkeys(result.attrs["dtypes"]))}


def movers_text(rows: pd.DataFrame) -> pd.DataFrame:
    """The heads that changed most, as text."""
    found = [
        (f"{r['layer']}.{r['head']}", general(r["mean_a"]), general(r["mean_b"]),
         signed(r["difference"], 4), signed(r["log2_ratio"]), f"{r['effect']:+.2f}",
         general(r["q"], 2), f"{r['rank_a']:g} → {r['rank_b']:g}")
        for r in rows.to_dict("records")
    ]  # fmt: skip
    columns = ["head", "mean in A", "in B", "difference", "log₂ ratio", "effect", "q", "rank"]
    return pd.DataFrame(found, columns=columns)


def _differing(attrs: Mapping[str, Any]) -> pd.DataFrame:
    """Differing entries of the runs' records, long values cut."""

    def text(value: Any) -> str | None:
        shown = None if value is None else str(value)
        return shown if shown is None or len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."

    a, b = attrs["names"]
    rows = [(d["key"], text(d["a"]), text(d["b"])) for d in attrs["differing"]]
    return pd.DataFrame(rows, columns=["setting", f"A: {a}", f"B: {b}"])
