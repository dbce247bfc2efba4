"""What `collect`, `validate`, `evaluate` and `bench` do, from settings to files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_headnorm import results
from tl_headnorm.config.run import BenchSettings, EvaluateSettings, Settings
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import Questions
from tl_headnorm.figures.heatmaps import save_bars, save_heatmap
from tl_headnorm.files import write_json, write_with
from tl_headnorm.hf import describe, validate
from tl_headnorm.jobs.keeping import kept_run
from tl_headnorm.jobs.opening import open_both, run_dir, say
from tl_headnorm.jobs.report import report_of_new_run
from tl_headnorm.measures import choose_measures
from tl_headnorm.model import Model
from tl_headnorm.runs.whole import collect, collect_share


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


def run_validate(settings: Settings) -> tuple[Path, bool]:
    """Compare with Hugging Face, write validation.json; its directory and whether it held."""
    with run_dir(settings.output_dir, f"{settings.experiment_name}_validation") as path:
        model, questions = open_both(settings)
        chosen = questions[: settings.validate_samples or None]
        plain = replace(settings, validate_samples=0, per_sample=True)
        run = collect(model, chosen, plain)
        encoded = prepare(model.tokenizer, model.n_ctx, chosen, plain).encoded
        report = validate(model, run, encoded, plain, progress=True)
        write_json(path / "config.json", settings.as_dict())
        write_json(path / "validation.json", report)
    say(describe(report))
    return path, bool(report["passed"])


def run_evaluate(settings: EvaluateSettings) -> Path:
    """Score the answers, write evaluation.json and samples.parquet; the directory."""
    from tl_headnorm.studies.evaluate import evaluate

    with run_dir(settings.output_dir, f"{settings.experiment_name}_evaluation") as path:
        model, questions = open_both(settings)
        result = evaluate(model, questions, settings)
        write_json(path / "config.json", settings.as_dict())
        table = result.to_dataframe().reset_index(drop=True)
        write_with(path / "samples.parquet", lambda f: table.to_parquet(f, index=False))
        write_json(path / "evaluation.json", result.attrs)
    found = ", ".join(
        f"{key} {result.attrs[key]:.3f}" for key in ("acc", "acc_norm") if key in result.attrs
    )
    say(f"{settings.scoring} scoring, {result.attrs['num_processed']:,} questions: {found}")
    return path


def run_bench(settings: BenchSettings) -> Path:
    """Run the bench, write bench.json and the bar chart; its directory."""
    from tl_headnorm.bench import side_by_side

    with run_dir(settings.output_dir, "bench") as path:
        write_json(path / "config.json", settings.as_dict())
        report = side_by_side.run_bench(settings)
        write_json(path / "bench.json", report)
        save_bars(report, path / "bench")
    say(side_by_side.table(report))
    return path
