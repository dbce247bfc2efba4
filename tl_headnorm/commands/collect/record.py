"""What a run of collect is measured with, checked against and recorded as."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.data.prepare import Prepared
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.measures import choose_measures
from tl_headnorm.measures.measurer import MeasureOptions
from tl_headnorm.model.loading import Model
from tl_headnorm.oracle.hugging_face import comparable, describe
from tl_headnorm.oracle.hugging_face import validate as compare
from tl_headnorm.run.fingerprints import weights
from tl_headnorm.run.record import git_commit, versions
from tl_headnorm.settings import Settings


def options_of(settings: Settings, questions: Sequence[Question]) -> MeasureOptions:
    """The measurement options of a run's settings."""
    measures = choose_measures(
        settings.measures, settings.measures_file, scored=settings.score_answers
    )
    if settings.validate_samples:
        comparable([measure.name for measure in measures])
    return MeasureOptions(
        token_agg=settings.token_agg,
        exclude_first_token=settings.exclude_first_token,
        padding_side=settings.padding_side,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        score=settings.score_answers,
        measures=measures,
        answers=[question.answer for question in questions],
    )


def record_of(
    model: Model,
    prompts: Prepared,
    settings: Settings,
    options: MeasureOptions,
    spent: Mapping[str, Any],
) -> dict[str, Any]:
    """What meta.json says, but for what only the values tell."""
    tokens, seconds = sum(len(sample) for sample in prompts.encoded), spent["wall_seconds"]
    return {
        "num_processed": len(prompts.encoded),
        **prompts.record,
        "model": model.info.as_dict(),
        "weights_sha256": weights(model),
        "padding_side": settings.padding_side,
        "token_agg": settings.token_agg,
        "exclude_first_token": settings.exclude_first_token,
        "measures": {m.name: {"formula": m.formula, "unit": m.unit} for m in options.measures},
        "answer_scoring": "letter" if settings.score_answers else None,
        "versions": versions(),
        "git_commit": git_commit(),
        "validated_against_hf": None,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "seed": settings.seed,
        "settings": settings.as_dict(),
        **spent,
        "wall_seconds": round(seconds, 3),
    }


def warn_missing(run: xr.Dataset) -> None:
    """Warn of layers without values."""
    missing = run.attrs["missing_layers"]
    if missing:
        warnings.warn(
            f"no values for layers {missing}: their hook_z did not fire; they are NaN with count 0",
            stacklevel=3,
        )


def validate(
    model: Model,
    values: Mapping[str, np.ndarray],
    samples: Sequence[Encoded],
    settings: Settings,
    run: xr.Dataset,
) -> None:
    """Compare the first samples with Hugging Face; the record says how it went."""
    measured = xr.Dataset({n: (("sample", "layer", "head"), v) for n, v in values.items()})
    checked = compare(model, measured, samples, settings, settings.validate_samples)
    run.attrs["validated_against_hf"] = checked["worst_relative"]
    if "precision" in checked:
        run.attrs["precision"] = checked["precision"]
    if not checked["passed"]:
        warnings.warn(f"Hugging Face disagrees: {describe(checked)}", stacklevel=3)
