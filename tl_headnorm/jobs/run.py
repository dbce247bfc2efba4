"""What the commands do, from settings to files."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

from tl_headnorm import results
from tl_headnorm.collecting import collect
from tl_headnorm.config.run import BenchSettings, EvaluateSettings, Settings
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import Questions, load_questions
from tl_headnorm.data.templates import get_template
from tl_headnorm.figures.heatmaps import save_heatmap
from tl_headnorm.files import write_json, write_with
from tl_headnorm.hf import describe, validate
from tl_headnorm.measures import MEASURES
from tl_headnorm.model import Model, load_model


def say(text: str) -> None:
    """For the person watching; stdout is kept for the path."""
    print(text, file=sys.stderr, flush=True)


def _quiet() -> None:
    """Libraries keep to errors, and their bars away: the one bar shown is that of the samples."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for noisy in ("httpx", "huggingface_hub", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _open(settings: Settings) -> tuple[Model, Questions]:
    """Questions first: they fail fast, a model is slow to load."""
    _quiet()
    if settings.template_name != "auto":
        get_template(settings.template_name, settings.template)
    questions = load_questions(
        settings.dataset,
        settings.data_dir,
        settings.split,
        max_samples=settings.max_samples,
        n_options=settings.n_options,
        on_bad_record=settings.on_bad_record,
    )
    model = load_model(
        settings.model_path,
        dtype=settings.dtype,
        engine=settings.engine,
        device_map=settings.device_map,
        self_check=settings.self_check,
        trust_remote_code=settings.trust_remote_code,
        adapter_path=settings.adapter_path,
    )
    return model, questions


def run_collect(settings: Settings) -> Path:
    """Measure, write the run directory, say in a few lines what came out; its path."""
    path = results.new_run_dir(settings.output_dir, settings.experiment_name)
    try:
        model, questions = _open(settings)
        run = collect(model, questions, settings, scratch=path)
        if not settings.per_sample:
            run = run.drop_vars([name for name in MEASURES if name in run])
        results.save_arrays(run, path)
        for name in MEASURES:
            save_heatmap(run[f"{name}_mean"], path / f"{name}_heatmap")
        results.remove_scratch(path)
        results.finish(run, path)
    except BaseException:
        results.remove_scratch(path)
        results.remove_if_empty(path)
        raise
    meta = run.attrs
    accuracy = meta["accuracy"]
    say(
        f"{meta['num_processed']:,} samples ({sum(meta['num_skipped'].values())} skipped, "
        f"{meta['num_truncated']} truncated) in {meta['wall_seconds']:.1f} s, "
        f"{meta['tokens_per_second']:,.0f} tokens/s; accuracy (letter): "
        + ("not scored" if accuracy is None else f"{accuracy:.3f}")
    )
    if meta["validated_against_hf"] is not None:
        say(f"against Hugging Face: worst relative difference {meta['validated_against_hf']:.1e}")
    return path


def run_validate(settings: Settings) -> tuple[Path, bool]:
    """Compare with Hugging Face, write validation.json; its directory and whether it held."""
    path = results.new_run_dir(settings.output_dir, f"{settings.experiment_name}_validation")
    try:
        model, questions = _open(settings)
        limit = settings.validate_samples or -1
        chosen = questions if limit < 0 else questions[:limit]
        plain = replace(settings, validate_samples=0)
        run = collect(model, chosen, plain)
        encoded = prepare(model.tokenizer, model.n_ctx, chosen, plain).encoded
        report = validate(model, run, encoded, plain, progress=True)
        write_json(path / "config.json", settings.as_dict())
        write_json(path / "validation.json", report)
    except BaseException:
        results.remove_scratch(path)
        results.remove_if_empty(path)
        raise
    say(describe(report))
    return path, bool(report["passed"])


def bench(settings: BenchSettings) -> Path:
    """Run the bench, write bench.json and the bar chart; its directory."""
    from tl_headnorm.bench import run_bench, table
    from tl_headnorm.figures.heatmaps import save_bars

    path = results.new_run_dir(settings.output_dir, "bench")
    try:
        write_json(path / "config.json", settings.as_dict())
        report = run_bench(settings)
        write_json(path / "bench.json", report)
        save_bars(report, path / "bench")
    except BaseException:
        results.remove_scratch(path)
        results.remove_if_empty(path)
        raise
    say(table(report))
    return path


def run_evaluate(settings: EvaluateSettings) -> Path:
    """Score the answers, write evaluation.json and samples.parquet; the directory."""
    from tl_headnorm.studies.evaluate import evaluate

    path = results.new_run_dir(settings.output_dir, f"{settings.experiment_name}_evaluation")
    try:
        model, questions = _open(settings)
        result = evaluate(model, questions, settings)
        write_json(path / "config.json", settings.as_dict())
        table = result.to_dataframe().reset_index(drop=True)
        write_with(path / "samples.parquet", lambda f: table.to_parquet(f, index=False))
        write_json(path / "evaluation.json", result.attrs)
    except BaseException:
        results.remove_if_empty(path)
        raise
    found = ", ".join(
        f"{key} {result.attrs[key]:.3f}" for key in ("acc", "acc_norm") if key in result.attrs
    )
    say(f"{settings.scoring} scoring, {result.attrs['num_processed']:,} questions: {found}")
    return path
