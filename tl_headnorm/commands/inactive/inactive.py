"""From questions and settings to curves, a ranking, and a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.commands.inactive import ranking
from tl_headnorm.commands.inactive.curves import Bench, Curve, all_curves, leave_one_out, numbered
from tl_headnorm.commands.inactive.scores import (
    Score,
    fixed_order,
    logistic,
    make_scores,
    mean_rank,
    rank_correlations,
)
from tl_headnorm.commands.inactive.settings import InactiveSettings
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError, nearest
from tl_headnorm.interventions.replacements import gather_reference
from tl_headnorm.measures import FOLLOW_TOKEN_AGG, Measure, choose_measures
from tl_headnorm.model.loading import Model
from tl_headnorm.run import results

LEAVE_ONE_OUT = "leave_one_out"


@dataclass(frozen=True)
class Split:
    """Rows of the questions that rank heads, and rows on which the ranking is measured."""

    calibration: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Found:
    """Results of the experiment."""

    scores: list[Score]
    curves: list[Curve]
    clean: dict[str, np.ndarray]
    table: pd.DataFrame
    ranking: pd.DataFrame
    correlations: pd.DataFrame
    verdict: ranking.Verdict
    split: Split
    record: dict[str, Any]


def split_rows(n: int, calibration_share: float) -> Split:
    """Both parts spread evenly over the questions' order. Raises InputError for too few."""
    steps = np.floor(np.arange(n + 1) * calibration_share + 1e-9)
    first = np.diff(steps) > 0
    if min(first.sum(), (~first).sum()) < 2:
        raise InputError(
            f"calibration_share: expected 2 samples or more to rank heads and 2 to measure, found "
            f"{first.sum()} and {(~first).sum()}; raise --max_samples"
        )
    return Split(np.flatnonzero(first), np.flatnonzero(~first))


def chosen_measures(settings: InactiveSettings) -> tuple[Measure, ...]:
    """The measures tried; `all` without those that only follow token_agg."""
    found = choose_measures(settings.measures, settings.measures_file)
    if settings.measures in ("all", ("all",)):
        found = tuple(m for m in found if m.name not in FOLLOW_TOKEN_AGG)
    return found


def values_of_run(
    run: xr.Dataset, model: Model, prepared: Prepared, ids: Sequence[str], settings: Any
) -> tuple[tuple[Measure, ...], dict[str, np.ndarray]]:
    """The measures a finished run holds and their values in the questions' order.

    Raises InputError where the run is of another model, template or dataset.
    """
    source = settings.run
    names = [name for name in results.measures_of(run) if name in run]
    if settings.measures not in ("all", ("all",)):
        names = [measure.name for measure in chosen_measures(settings)]
    elif set(names) - set(FOLLOW_TOKEN_AGG):
        names = [name for name in names if name not in FOLLOW_TOKEN_AGG]
    missing = [name for name in names if name not in run]
    if missing or not names:
        raise InputError(
            f"run: expected per-sample values of {', '.join(missing) or 'a measure'}, found none "
            f"in {source}; collect with --measures all and --per_sample true"
        )
    shape = (run.sizes["layer"], run.sizes["head"])
    expected = (model.info.n_layers, model.info.n_heads)
    if shape != expected:
        raise InputError(
            f"run: expected a run of a model with {expected[0]} layers and {expected[1]} heads, "
            f"found {shape[0]} and {shape[1]} in {source}"
        )
    if run.attrs["template"]["sha256"] != prepared.record["template"]["sha256"]:
        raise InputError(
            f"run: expected a run with the template {prepared.record['template']['name']}, found "
            f"{run.attrs['template']['name']} in {source}; give the run's --template_name"
        )
    rows = {str(name): row for row, name in enumerate(run["sample_id"].values)}
    absent = [name for name in ids if name not in rows]
    if absent:
        raise InputError(
            f"run: expected the run's own questions, found {len(absent)} that it does not hold "
            f"(first: {absent[0]}); give the run's --dataset, --split and --max_samples"
        )
    order = [rows[name] for name in ids]
    measures = choose_measures(names, settings.measures_file)
    return measures, {name: run[name].values[order].astype(np.float64) for name in names}


def measure_here(
    model: Model, encoded: Sequence[Encoded], answers: Sequence[int], settings: InactiveSettings
) -> tuple[tuple[Measure, ...], dict[str, np.ndarray]]:
    """The measures and their values, by one clean pass over all samples."""
    measures = chosen_measures(settings)
    _above(settings, measures)  # refused before it costs anything
    found = measure_samples(
        model, encoded, measures=measures, answers=answers, batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens, padding_side=settings.padding_side,
        progress=True,
    )  # fmt: skip
    return measures, {name: np.asarray(v, np.float64) for name, v in found.values.items()}


def find_inactive(
    model: Model,
    questions: Sequence[Question],
    settings: InactiveSettings,
    *,
    run: xr.Dataset | None = None,
    orders: Mapping[str, np.ndarray] | None = None,
    progress: bool = False,
) -> Found:
    """Rank heads by every score on one part of the questions, switch them off on the other.

    `orders` are further rankings [layer, head], larger is more useful, such as attributions'.
    Accuracy and loss are those of the options' letters. What the numbers cannot tell: whether
    what is off does nothing at all, or nothing that these questions ask for.

    1 split the questions  2 score heads on one part  3 run the other part without the heads that
    each score chooses  4 areas, a ranking of the scores, a verdict.
    """
    # 1
    prepared = prepare(model.tokenizer, model.n_ctx, questions, settings)
    encoded, answers = prepared.encoded, [q.answer for q in questions]
    split = split_rows(len(encoded), settings.calibration_share)
    # 2
    if run is None:
        measures, values = measure_here(model, encoded, answers, settings)
    else:
        ids = [q.id for q in questions]
        measures, values = values_of_run(run, model, prepared, ids, settings)
    scores = make_scores(
        measures, {n: v[split.calibration] for n, v in values.items()},
        {n: v[split.held_out] for n, v in values.items()},
        normalise=settings.normalise, above=_above(settings, measures),
    )  # fmt: skip
    ranking_samples = [encoded[i] for i in split.calibration]
    scores += _combined(model, scores, ranking_samples, answers, settings)
    scores += [fixed_order(name, value) for name, value in (orders or {}).items()]
    # 3
    reference = None
    if "mean" in settings.methods:
        reference = gather_reference(
            model, ranking_samples, batch_size=settings.batch_size,
            padding_side=settings.padding_side, seed=settings.seed,
        )  # fmt: skip
    bench = Bench(
        model, numbered([encoded[i] for i in split.held_out]),
        [answers[i] for i in split.held_out], settings, reference, progress=progress,
    )  # fmt: skip
    curves = all_curves(bench, scores)
    # 4
    return _judged(scores, curves, bench, split, prepared, settings)


def _above(settings: InactiveSettings, measures: Sequence[Measure]) -> list[str]:
    """Measures tried in both directions; of the default ones those that are measured."""
    names, usual = {measure.name for measure in measures}, InactiveSettings().chosen_above
    for name in settings.chosen_above:
        if name not in names and name not in usual:
            raise InputError(
                f"above: expected measures that are tried, found {name!r}{nearest(name, names)}; "
                "add it to --measures, or leave it out"
            )
    return [name for name in settings.chosen_above if name in names]


def _combined(
    model: Model,
    scores: Sequence[Score],
    samples: Sequence[Encoded],
    answers: Sequence[int],
    settings: InactiveSettings,
) -> list[Score]:
    """Mean rank, leave-one-out effects, and the logistic model of them."""
    found: list[Score] = []
    plain = [s for s in scores if not s.looks and s.sign > 0]
    if settings.combine and len(plain) > 1:
        found.append(mean_rank(plain))
    if settings.loo_samples:
        few = samples[: settings.loo_samples]
        effect = leave_one_out(model, few, [answers[s.index] for s in few], settings)
        if settings.combine and len(plain) > 1:
            found.append(logistic(plain, effect, settings.seed))
        found.append(fixed_order(LEAVE_ONE_OUT, effect))
    return found


def _judged(
    scores: list[Score],
    curves: list[Curve],
    bench: Bench,
    split: Split,
    prepared: Prepared,
    settings: InactiveSettings,
) -> Found:
    judged = ranking.gather(curves, bench.clean)
    top = settings.shares[-1]
    ranked, boots = ranking.ranking(
        judged, top=top, points=settings.points, repeats=settings.bootstrap, seed=settings.seed
    )
    return Found(
        scores=scores,
        curves=curves,
        clean=bench.clean,
        table=ranking.curves_table(curves, bench.clean, settings.shares),
        ranking=ranked,
        correlations=rank_correlations(scores),
        verdict=ranking.verdict(judged, ranked, boots, top=top),
        split=split,
        record=prepared.record,
    )
