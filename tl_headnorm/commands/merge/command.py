"""What `merge` does, from run directories to one."""

from pathlib import Path

from tl_headnorm.commands.merge.merging import merge_runs
from tl_headnorm.commands.merge.settings import MergeSettings
from tl_headnorm.commands.report.command import report_of_new_run
from tl_headnorm.plots.heatmaps import save_heatmap
from tl_headnorm.run import results
from tl_headnorm.run.loading import run_dir, say


def run_merge(settings: MergeSettings) -> Path:
    """Read, check, merge, write a run directory like collect's; its path."""
    paths = [Path(run).expanduser().resolve() for run in settings.runs]
    runs = [results.load_run(path) for path in paths]
    merged = merge_runs(runs, [str(path) for path in paths])
    merged.attrs["merge"] |= {"runs": list(map(str, paths)), "finished_at": results.now()}
    names = results.measures_of(merged)
    with run_dir(settings.output_dir, settings.experiment_name) as path:
        results.save_arrays(merged, path)
        for name in names:
            save_heatmap(merged[f"{name}_mean"], path / f"{name}_heatmap")
        report_of_new_run(merged, path)
        results.finish(merged, path)
    without = [str(p) for p, run in zip(paths, runs, strict=True) if names[0] not in run]
    if 0 < len(without) < len(runs):
        say(f"no per_sample.npz is written: {', '.join(without)} has none")
    accuracy = merged.attrs["accuracy"]
    say(
        f"{merged.attrs['num_processed']:,} samples of {len(merged.attrs['merged'])} runs, order: "
        f"{merged.attrs['merge']['order']}; accuracy (letter): "
        + ("not scored" if accuracy is None else f"{accuracy:.3f}")
    )
    return path
