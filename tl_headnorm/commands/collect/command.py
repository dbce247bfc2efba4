"""`collect`, from settings to files."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from tl_headnorm.commands.collect.collect import collect_into
from tl_headnorm.data.questions import Question, Questions
from tl_headnorm.measures import choose_measures
from tl_headnorm.model.loading import Model
from tl_headnorm.run.loading import open_both, say
from tl_headnorm.run.log import OnDisk
from tl_headnorm.run.results import finish, save_arrays
from tl_headnorm.run.resume import resumable_run
from tl_headnorm.settings import Settings

# Adds figures and pages to the directory of a new run; the questions are None where they are not
# at hand. The table of commands says which (`then`).
Draw = Callable[[xr.Dataset, Path, Sequence[Question] | None], None]


def run_collect(settings: Settings, draw: Draw) -> Path | None:
    """Measure, write the run directory, say in a few lines what came out; its path.

    Of several processes the first writes; the others return None.
    """
    with resumable_run(settings) as begun:
        path, ranks = begun.path, begun.ranks
        if begun.finished:
            if ranks.first:
                say(f"{path} is finished: nothing is left to do")
            return path if ranks.first else None
        model, questions = ranks.agree(lambda: _open(begun.settings))
        log = OnDisk(begun.state, settings.checkpoint_every, ranks, begun.stop)
        run = collect_into(log, model, questions, replace(settings, resume=None))
        if run is None:
            return None
        write_run(run, path, questions, draw)
        begun.finish()
    say(_in_short(run.attrs))
    return path


def write_run(
    run: xr.Dataset, path: Path, questions: Sequence[Question] | None, draw: Draw
) -> None:
    """Every file of a run directory: arrays and tables, figures and pages, meta.json last."""
    save_arrays(run, path)
    draw(run, path, questions)
    finish(run, path)


def _open(settings: Settings) -> tuple[Model, Questions]:
    # First: an unknown measure is found at once, a model is slow to load.
    choose_measures(settings.measures, settings.measures_file, scored=settings.score_answers)
    return open_both(settings)


def _in_short(meta: dict[str, Any]) -> str:
    """What came out of a run, in a line or two."""
    accuracy = meta["accuracy"]
    text = (
        f"{meta['num_processed']:,} samples ({sum(meta['num_skipped'].values())} skipped, "
        f"{meta['num_truncated']} truncated) in {meta['wall_seconds']:.1f} s, "
        f"{meta['tokens_per_second']:,.0f} tokens/s; accuracy (letter): "
        + ("not scored" if accuracy is None else f"{accuracy:.3f}")
    )
    worst = meta["validated_against_hf"]
    if worst is not None:
        text += f"\nagainst Hugging Face: worst relative difference {worst:.1e}"
    return text
