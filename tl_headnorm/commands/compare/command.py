"""`compare`: from two run directories to tables, figures and pages."""

import warnings
from pathlib import Path
from typing import Any

import xarray as xr

from tl_headnorm.commands.compare import plots
from tl_headnorm.commands.compare.compare import compare, movers, table
from tl_headnorm.commands.compare.settings import CompareSettings
from tl_headnorm.commands.compare.summary import page, summary
from tl_headnorm.plots.save import save_png
from tl_headnorm.run import results
from tl_headnorm.run.files import write_json, write_text, write_with
from tl_headnorm.run.loading import run_dir, say
from tl_headnorm.run.reading import load_run


def run_compare(settings: CompareSettings) -> Path:
    """Compare two runs, write the table, a page, figures and a summary; the directory."""
    runs = [load_run(path) for path in settings.runs]
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
        for name, moved in changed.items():
            figure = plots.figure(result, name, moved, settings.fdr)
            save_png(figure, path / f"{name}_change.png")
        write_text(path / "compare.html", page(result, changed, settings))
        text = summary(result, changed, settings)
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
