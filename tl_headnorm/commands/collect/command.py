"""What `collect`, `validate`, `evaluate` and `bench` do, from settings to files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_headnorm.commands.collect.collect import collect_share
from tl_headnorm.commands.report.command import report_of_new_run
from tl_headnorm.data.questions import Questions
from tl_headnorm.measures import choose_measures
from tl_headnorm.model.loading import Model
from tl_headnorm.plots.heatmaps import save_heatmap
from tl_headnorm.run import results
from tl_headnorm.run.loading import open_both, say
from tl_headnorm.run.resumable import kept_run
from tl_headnorm.settings import Settings


def run_collect(settings: Settings) -> Path | None:
    """Measure, write the run directory, say in a few lines what came out; its path.

    Of several processes the first writes; the others return None.
    """
    with kept_run(settings) as kept:
        path = kept.path
        if kept.finished:
            if kept.ranks.first:
                say(f"{path} is finished: nothing is left to do")
            return path if kept.ranks.first else None
        model, questions = kept.ranks.together(lambda: _open(kept.placed))
        as_begun = replace(settings, resume=None)
        run = collect_share(model, questions, as_begun, keeper=kept.keeper)
        if run is None:
            return None
        results.save_arrays(run, path)
        for name in results.measures_of(run):
            save_heatmap(run[f"{name}_mean"], path / f"{name}_heatmap")
        report_of_new_run(run, path, questions)
        results.finish(run, path)
        kept.finish()
    say(_in_short(run.attrs))
    return path


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
