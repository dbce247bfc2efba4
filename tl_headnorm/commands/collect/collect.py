"""A whole run: questions in, a Dataset out, its state kept on the way where that is asked for."""

import logging
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_headnorm.commands.collect.measuring import (
    Collected,
    Progress,
    measure_planned,
    measure_samples,
    plan_samples,
)
from tl_headnorm.data.plan import Planned
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.measures import choose_measures
from tl_headnorm.measures.measurer import How, most_tokens
from tl_headnorm.model.loading import Model
from tl_headnorm.oracle import hugging_face
from tl_headnorm.run import fingerprints, results
from tl_headnorm.run.checkpoints import Keeper, Kept, Layout, locked
from tl_headnorm.run.ranks import Ranks
from tl_headnorm.run.resume import STATE
from tl_headnorm.settings import Settings


def collect(
    model: Model,
    questions: Sequence[Question],
    settings: Settings | None = None,
    *,
    progress: bool = True,
    state_dir: str | Path | None = None,
    **overrides: Any,
) -> xr.Dataset:
    """Measure every head over a set of questions.

    Settings may be given by name: `collect(model, questions, token_agg="all")`. Returns a
    Dataset with dims (layer, head[, sample]): `<measure>_mean`, `_std` (ddof 1), `_n` and, with
    `per_sample`, the per-sample `<measure>` in dataset order, and the run's record in `attrs`.

    `head_output_norm` is ||z_h||_2, `head_resid_contrib_norm` is ||z_h W_O^h||_2, taken at the
    last real token of a prompt or averaged over all its real tokens; `measures` names others
    (MEASURES in measures/table.py).

    With `state_dir` what was measured is kept there every `checkpoint_every` seconds, per-sample
    values instead of in memory, until all is measured: the same call goes on after an
    interruption, and gives what it would have given without one.

    What the numbers cannot tell: the direction of a head's contribution, and whether anything
    downstream reads it.
    """
    settings = (settings or Settings()).updated(**overrides)
    if state_dir is None:
        run = collect_share(model, questions, settings, progress=progress)
    else:
        folder = Path(state_dir) / STATE
        folder.mkdir(parents=True, exist_ok=True)
        keeper = Keeper(folder, settings.checkpoint_every)
        with locked(folder, alone=True):
            try:
                run = collect_share(model, questions, settings, progress=progress, keeper=keeper)
            finally:
                keeper.close()
            # The arrays stay readable: a file that is mapped lives on without its name.
            shutil.rmtree(folder)
    assert run is not None  # one process alone gets it
    return run


def collect_share(
    model: Model,
    questions: Sequence[Question],
    settings: Settings,
    *,
    progress: bool = True,
    keeper: Keeper | None = None,
) -> xr.Dataset | None:
    """What `collect` does, as one of the keeper's processes; the first of them gets the Dataset."""
    started_at, clock = results.now(), time.perf_counter()
    ranks = Ranks()
    if keeper:
        ranks, keeper.began = keeper.ranks, time.monotonic()
    prepared = ranks.together(lambda: prepare(model.tokenizer, model.n_ctx, questions, settings))
    how = _how(settings, questions)
    ids = [question.id for question in questions]
    if keeper is None:
        wanted = settings.per_sample or settings.validate_samples
        none: dict[str, Any] | None = None if wanted else {}
        collected = measure_samples(
            model, prepared.encoded, store=none, progress=progress, names=ids, **vars(how)
        )
        spent = {"started_at": started_at, "wall_seconds": time.perf_counter() - clock}
    else:
        kept = _measure_kept(model, prepared, how, settings, keeper, ids, started_at, progress)
        if kept is None:
            return None
        collected, spent = Collected(kept.values, kept.moments, kept.predicted), keeper.spent()
    record = _record(model, prepared, settings, how, spent)
    run = results.build(collected.values if settings.per_sample else {}, collected.moments, record)
    results.add_samples(run, questions, prepared.encoded, collected.predicted)
    _warn_missing(run)
    if settings.validate_samples:
        _validate(model, collected.values, prepared.encoded, settings, run)
    run.attrs["finished_at"] = results.now()
    return run


def _how(settings: Settings, questions: Sequence[Question]) -> How:
    measures = choose_measures(
        settings.measures, settings.measures_file, scored=settings.score_answers
    )
    if settings.validate_samples:
        hugging_face.comparable([measure.name for measure in measures])
    return How(
        token_agg=settings.token_agg,
        exclude_first_token=settings.exclude_first_token,
        padding_side=settings.padding_side,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        score=settings.score_answers,
        measures=measures,
        answers=[question.answer for question in questions],
    )


def _measure_kept(
    model: Model,
    prepared: Prepared,
    how: How,
    settings: Settings,
    keeper: Keeper,
    ids: Sequence[str],
    started_at: str,
    progress: bool,
) -> Kept | None:
    """Measure what is left for this process; the first of them gets what all have measured."""
    samples, ranks, recorded = prepared.encoded, keeper.ranks, keeper.recorded()
    facts: dict[str, Any] = {
        "started_at": started_at,
        "max_batch_tokens": how.max_batch_tokens,
        "made_by": {**results.versions(), "device": model.device.type},
    }
    if recorded:  # the batches must be the same ones, whatever memory is free now
        if ranks.first:
            _say_what_changed(recorded["facts"]["made_by"], facts["made_by"])
        facts = recorded["facts"]
    elif how.max_batch_tokens == "auto":
        mine = most_tokens(model, how, max(map(len, samples)))
        if model.device.type != "cuda":  # the host's memory, which the processes share
            mine = max(1, mine // ranks.local_world)
        facts["max_batch_tokens"] = min(ranks.everyones(mine))
    how = replace(how, max_batch_tokens=int(facts["max_batch_tokens"]))
    plan = plan_samples(model, samples, how)
    layout = Layout(
        batches=len(plan),
        samples=len(samples),
        rows=len(samples) if settings.per_sample else min(settings.validate_samples, len(samples)),
        layers=model.info.n_layers,
        heads=model.info.n_heads,
        measures=tuple(measure.name for measure in how.measures),
        scored=how.score,
    )
    keeper.begin(layout, fingerprints.of_run(model, prepared, how, plan), facts)
    left = keeper.mine(plan)
    total = sum(len(planned.samples) for planned in left)
    before = len(samples) - total if ranks.world == 1 else 0
    title = "collect" if ranks.world == 1 else f"collect (process 1 of {ranks.world})"
    shown = progress and ranks.first
    with keeper.stop.held(), Progress(before + total, shown, before=before, title=title) as bar:

        def done(planned: Planned) -> None:
            bar.step(planned)
            keeper.done(planned.number)

        measure_planned(model, left, samples, keeper.share, how, names=ids, done=done)
    keeper.share.peak_memory = max(
        keeper.share.peak_memory, results.peak_memory_bytes(model.device.type)
    )
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    return keeper.gather(plan, row_of)


def _say_what_changed(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [f"{k} {before.get(k)}, now {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        logging.getLogger("tl_headnorm").warning(
            "resumed with %s: the batches that are left may differ in their last digits from what "
            "they would have given",
            "; ".join(changed),
        )


def _validate(
    model: Model,
    values: Mapping[str, np.ndarray],
    encoded: Sequence[Encoded],
    settings: Settings,
    run: xr.Dataset,
) -> None:
    """Compare the first samples with Hugging Face; the record says how it went."""
    seen = xr.Dataset({n: (("sample", "layer", "head"), v) for n, v in values.items()})
    checked = hugging_face.validate(model, seen, encoded, settings, settings.validate_samples)
    run.attrs["validated_against_hf"] = checked["worst_relative"]
    if "precision" in checked:
        run.attrs["precision"] = checked["precision"]
    if not checked["passed"]:
        warnings.warn(f"Hugging Face disagrees: {hugging_face.describe(checked)}", stacklevel=3)


def _record(
    model: Model,
    prepared: Prepared,
    settings: Settings,
    how: How,
    spent: Mapping[str, Any],
) -> dict[str, Any]:
    """What meta.json says, but for what only the values tell."""
    tokens, seconds = sum(len(sample) for sample in prepared.encoded), spent["wall_seconds"]
    return {
        "num_processed": len(prepared.encoded),
        **prepared.record,
        "model": model.info.as_dict(),
        "weights_sha256": fingerprints.weights(model),
        "padding_side": settings.padding_side,
        "token_agg": settings.token_agg,
        "exclude_first_token": settings.exclude_first_token,
        "measures": {m.name: {"formula": m.formula, "unit": m.unit} for m in how.measures},
        "answer_scoring": "letter" if settings.score_answers else None,
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "validated_against_hf": None,
        "processes": 1,
        "sessions": 1,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_memory_bytes": results.peak_memory_bytes(model.device.type),
        "seed": settings.seed,
        "settings": settings.as_dict(),
        **spent,
        "wall_seconds": round(seconds, 3),
    }


def _warn_missing(run: xr.Dataset) -> None:
    missing = run.attrs["missing_layers"]
    if missing:
        warnings.warn(
            f"no values for layers {missing}: their hook_z did not fire; they are NaN with count 0",
            stacklevel=3,
        )
