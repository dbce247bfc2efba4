"""`merge`, from run directories to one."""

from pathlib import Path

from tl_headnorm.commands.collect.command import Draw, write_run
from tl_headnorm.commands.merge.merging import check_runs, merge_runs
from tl_headnorm.commands.merge.settings import MergeSettings
from tl_headnorm.run.directory import run_dir
from tl_headnorm.run.loading import say
from tl_headnorm.run.reading import load_run
from tl_headnorm.run.record import now
from tl_headnorm.run.results import measures_of


def run_merge(settings: MergeSettings, draw: Draw) -> Path:
    """Read, check, merge, write a run directory like collect's; its path."""
    names = [str(Path(run).expanduser().resolve()) for run in settings.runs]
    runs = [load_run(name, mapped=True) for name in names]
    check_runs(runs, names)
    with run_dir(settings.output_dir, settings.experiment_name) as path:
        merged = merge_runs(runs, names, folder=path)
        merged.attrs["merge"] |= {"runs": names, "finished_at": now()}
        write_run(merged, path, None, draw)
    measure = measures_of(merged)[0]
    without = [name for name, run in zip(names, runs, strict=True) if measure not in run]
    if 0 < len(without) < len(runs):
        say(f"no per_sample.npz is written: {', '.join(without)} has none")
    accuracy = merged.attrs["accuracy"]
    say(
        f"{merged.attrs['num_processed']:,} samples of {len(merged.attrs['merged'])} runs, order: "
        f"{merged.attrs['merge']['order']}; accuracy (letter): "
        + ("not scored" if accuracy is None else f"{accuracy:.3f}")
    )
    return path
