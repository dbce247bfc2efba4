"""The heart: every head's norms for every sample of a dataset, and their running moments."""

import logging
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_headnorm import fingerprints, hf, hooks, results
from tl_headnorm.checkpoints import Keeper, Kept, Layout, Share, locked
from tl_headnorm.config.resume import STATE
from tl_headnorm.config.run import Settings
from tl_headnorm.data.batches import Batch, make_batch
from tl_headnorm.data.plan import Group, Planned, plan_run, prefix_groups
from tl_headnorm.data.prepare import Prepared, prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.measures import choose_measures
from tl_headnorm.measuring import Factors, Found, How, Measurer, factors_of, most_tokens
from tl_headnorm.memory import halves, is_out_of_memory
from tl_headnorm.model import Model
from tl_headnorm.sharding import Ranks
from tl_headnorm.stats import Moments


@dataclass
class Collected:
    """Per-sample values [sample, layer, head] and moments by measure; predictions by sample.

    The values are arrays, or the store they were written to.
    """

    values: Mapping[str, Any]
    moments: dict[str, Moments]
    predicted: Int[np.ndarray, " sample"]


def measure_samples(
    model: Model,
    samples: Sequence[Encoded],
    *,
    progress: bool = False,
    names: Sequence[str] = (),
    store: Mapping[str, Any] | None = None,
    factors: Factors | None = None,
    **how: Any,
) -> Collected:
    """Measure tokenised prompts; values come back in dataset order, whatever the batches were.

    `how` takes the fields of How. `store` receives the per-sample values by measure, where they
    are not to be kept in memory (anything that takes `store[name][rows] = values`; of a measure
    that it lacks none are kept). Raises InputError at a value that is not finite, with layer,
    head and sample.
    """
    options = How(**how)
    shape = (len(samples), model.info.n_layers, model.info.n_heads)
    measured = [measure.name for measure in options.measures]
    if store is None:
        store = {name: np.full(shape, np.nan, np.float32) for name in measured}
    moments = {name: Moments.empty(shape[1:]) for name in measured}
    out = Collected(store, moments, np.full(len(samples), -1))
    plan = plan_samples(model, samples, options)
    with _Progress(len(samples), progress) as bar:
        _measure(model, plan, samples, out, options, factors=factors, names=names, done=bar.step)
    return out


def plan_samples(model: Model, samples: Sequence[Encoded], how: How) -> list[Planned]:
    """The batches of a run; `max_batch_tokens` auto goes by the memory that is free now."""
    most = most_tokens(model, how, max(map(len, samples), default=1))
    shared = how.share_prefix and hooks.can_share_prefix(model.tl)
    groups = prefix_groups(samples) if shared else [Group(tuple(samples), 0)]
    return plan_run(groups, how.batch_size, most, sort=how.sort)


@torch.inference_mode()
def _measure(
    model: Model,
    plan: Sequence[Planned],
    samples: Sequence[Encoded],
    out: Collected | Share,
    how: How,
    *,
    names: Sequence[str],
    done: Callable[[Planned], None],
    factors: Factors | None = None,
) -> None:
    """Measure the planned batches into `out`; `done` hears of each when all of it is there."""
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    factors = factors or factors_of(model)
    group, measurer = None, None
    for planned in plan:
        if measurer is None or planned.group is not group:
            group = planned.group
            measurer = Measurer(model, factors, how, group.prefix)
        for batch, found in _parts(measurer, planned):
            rows = [row_of[sample.index] for sample in batch.samples]
            _check(found, batch, how, [names[r] if names else str(r) for r in rows])
            for name, value in found.values.items():
                out.moments[name].update(value)
                if name in out.values:
                    out.values[name][rows] = value
            out.predicted[rows] = found.predicted
        done(planned)


def _parts(measurer: Measurer, planned: Planned) -> Iterator[tuple[Batch, Found]]:
    """One batch measured; where it does not fit in memory it is halved and run again."""
    pending = deque([planned.samples])
    while pending:
        chosen = pending.popleft()
        batch = make_batch(chosen, measurer.how.padding_side, skip=planned.group.prefix_length)
        try:
            found = measurer(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            pending.extendleft(reversed(halves(chosen, error)))
            continue
        yield batch, found


class _Progress:
    """A bar on stderr that counts samples and shows tokens/s; `before` were measured earlier."""

    def __init__(self, total: int, shown: bool, *, before: int = 0, title: str = "collect") -> None:
        self.bar = tqdm(total=total, initial=before, unit="sample", disable=not shown, desc=title)
        self.started, self.tokens = time.perf_counter(), 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, planned: Planned) -> None:
        self.tokens += sum(len(sample) for sample in planned.samples)
        rate = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(len(planned.samples))


def _check(found: Found, batch: Batch, how: How, names: Sequence[str]) -> None:
    """NaN stands for a layer whose hook did not fire, or a prompt too short for the measure;
    anywhere else it is an error."""
    for measure in how.measures:
        value = found.values[measure.name]
        bad = ~np.isfinite(value)
        bad[:, list(found.missing)] = False
        bad[[len(sample) < measure.least_tokens for sample in batch.samples]] = False
        if bad.any():
            row, layer, head = np.argwhere(bad)[0]
            raise InputError(
                f"{measure.name}: expected finite values, found {value[row, layer, head]} in "
                f"layer {layer}, head {head} of sample {names[row]}; try --dtype fp32, or check "
                "the weights"
            )


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
        hf.comparable([measure.name for measure in measures])
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
    with keeper.stop.held(), _Progress(before + total, shown, before=before, title=title) as bar:

        def done(planned: Planned) -> None:
            bar.step(planned)
            keeper.done(planned.number)

        _measure(model, left, samples, keeper.share, how, names=ids, done=done)
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
    checked = hf.validate(model, seen, encoded, settings, settings.validate_samples)
    run.attrs["validated_against_hf"] = checked["worst_relative"]
    if not checked["passed"]:
        warnings.warn(f"Hugging Face disagrees: {hf.describe(checked)}", stacklevel=3)


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
