"""What `compare` does, from two run directories to files."""

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from tl_headnorm.commands.compare import plots as figures
from tl_headnorm.commands.compare.compare import compare, movers, table
from tl_headnorm.commands.compare.plots import verdict
from tl_headnorm.commands.compare.settings import CompareSettings
from tl_headnorm.run import results
from tl_headnorm.run.files import write_json, write_text, write_with
from tl_headnorm.run.loading import run_dir, say


def run_compare(settings: CompareSettings) -> Path:
    """Compare two runs, write the table, a page, figures and a summary; the directory."""
    runs = [results.load_run(path) for path in settings.runs]
    names = _names(settings)
    with warnings.catch_warnings():  # said below, a line each
        warnings.simplefilter("ignore", UserWarning)
        result = compare(runs[0], runs[1], names=names)
    with run_dir(settings.output_dir, settings.experiment_name) as path:
        write_json(path / "config.json", settings.as_dict())
        rows = table(result)
        write_with(path / "compare.parquet", lambda f: rows.to_parquet(f, index=False))
        changed = {
            str(name): movers(result, str(name), settings.top, settings.fdr)
            for name in result["measure"].values
        }
        figures.save(result, changed, path, settings.fdr)
        text = summarise(result, changed, settings)
        write_text(path / "summary.md", text)
        write_json(path / "meta.json", _meta(result, settings))
    for caution in result.attrs["cautions"]:
        say(f"warning: {caution}")
    say(text)
    return path


def _names(settings: CompareSettings) -> tuple[str, str]:
    """The names given, or the directories'; A and B where those are the same."""
    first, second = settings.names or [
        Path(run).expanduser().resolve().name for run in settings.runs
    ]
    return (first, second) if first != second else ("A", "B")


def _meta(result: xr.Dataset, settings: CompareSettings) -> dict[str, Any]:
    return {
        "runs": [str(Path(run).expanduser().resolve()) for run in settings.runs],
        "fdr": settings.fdr,
        **result.attrs,
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "finished_at": results.now(),
    }


def summarise(
    result: xr.Dataset, changed: dict[str, pd.DataFrame], settings: CompareSettings
) -> str:
    """summary.md: plain sentences with the numbers in them."""
    attrs = result.attrs
    a, b = attrs["names"]
    lines = [f"# {b} (B) compared to {a} (A)", ""]
    if attrs["paired"]:
        lines.append(f"{attrs['n_common']:,} samples are in both runs and are compared in pairs.")
    else:
        lines.append(
            f"{attrs['n_a']:,} and {attrs['n_b']:,} samples, not in pairs "
            f"({attrs['why_unpaired']}): Welch's test."
        )
    lines += [f"Warning: {caution}." for caution in attrs["cautions"]]
    if accuracy := attrs["accuracy"]:
        lines += ["", _accuracy(accuracy)]
    for name in result["measure"].values:
        lines += ["", *_measure(result, str(name), changed[str(name)], settings)]
    if attrs["left_out"]:
        lines += ["", f"In one run only, left out: {', '.join(attrs['left_out'])}."]
    lines += [
        "",
        "A head that changed need not be the cause: all layers above a changed head see another "
        "residual stream. q says that a change is not chance, not that it matters; with many "
        "samples a difference of rounding is no chance either.",
    ]
    return "\n".join(lines) + "\n"


def _accuracy(found: dict[str, Any]) -> str:
    text = (
        f"Accuracy (letter): {found['a']:.1%} in A, {found['b']:.1%} in B "
        f"({100 * found['difference']:+.1f} points)"
    )
    if "p" in found:
        text += (
            f"; {found['lost']} answers became wrong and {found['gained']} right, McNemar's exact "
            f"p {found['p']:.2g}"
        )
    return text + "."


def _measure(
    result: xr.Dataset, name: str, rows: pd.DataFrame, settings: CompareSettings
) -> list[str]:
    """What one measure shows."""
    lines = [f"## {name} ({result.attrs['measures'][name]['formula']})", ""]
    lines.append(verdict(result, name, settings.fdr))
    if len(rows):
        lines += [
            "",
            "| head | mean in A | in B | difference | log2 ratio | effect | q | rank |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        lines += [
            f"| {row['layer']}.{row['head']} | {row['mean_a']:.4g} | {row['mean_b']:.4g} | "
            f"{row['difference']:+.4g} | {row['log2_ratio']:+.3g} | {row['effect']:+.2f} | "
            f"{row['q']:.2g} | {row['rank_a']:g} → {row['rank_b']:g} |"
            for row in rows.to_dict("records")
        ]
    return lines
