"""What the commands do, from settings to files."""

import logging
import sys
from pathlib import Path

from tl_headnorm import results
from tl_headnorm.collecting import collect
from tl_headnorm.config import BenchSettings, Settings
from tl_headnorm.data.questions import Questions, load_questions
from tl_headnorm.data.templates import get_template
from tl_headnorm.figures import save_heatmap
from tl_headnorm.files import write_json
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
    )
    return model, questions


def run_collect(settings: Settings) -> Path:
    """Measure, write the run directory, say in a few lines what came out; its path."""
    path = results.new_run_dir(settings.output_dir, settings.experiment_name)
    try:
        model, questions = _open(settings)
        run = collect(model, questions, settings)
        if settings.validate_samples and run.attrs["validated_against_hf"] is None:
            checked = validate(model, questions, settings, limit=settings.validate_samples, run=run)
            run.attrs["validated_against_hf"] = checked["worst_relative"]
            run.attrs["finished_at"] = results.now()
        if not settings.per_sample:
            run = run.drop_vars([name for name in MEASURES if name in run])
        results.save_arrays(run, path)
        for name in MEASURES:
            save_heatmap(run[f"{name}_mean"], path / f"{name}_heatmap")
        results.finish(run, path)
    except BaseException:
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
        report = validate(model, questions[:limit] if limit > 0 else questions, settings,
                          limit=limit, progress=True)  # fmt: skip
        write_json(path / "config.json", settings.as_dict())
        write_json(path / "validation.json", report)
    except BaseException:
        results.remove_if_empty(path)
        raise
    say(describe(report))
    return path, bool(report["passed"])


def bench(settings: BenchSettings) -> Path:
    """Run the bench, write bench.json and the bar chart; its directory."""
    from tl_headnorm.bench import run_bench, table
    from tl_headnorm.figures import save_bars

    path = results.new_run_dir(settings.output_dir, "bench")
    try:
        write_json(path / "config.json", settings.as_dict())
        report = run_bench(settings)
        write_json(path / "bench.json", report)
        save_bars(report, path / "bench")
    except BaseException:
        results.remove_if_empty(path)
        raise
    say(table(report))
    return path
