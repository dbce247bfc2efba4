"""The heart: every head's measures for every sample of a dataset."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_headnorm.commands.collect.record import options_of, record_of, validate, warn_missing
from tl_headnorm.data.plan import Group, Planned, plan_run, prefix_groups
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import Question
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import halving_on_oom
from tl_headnorm.errors import InputError
from tl_headnorm.measures.measurer import (
    Factors,
    Found,
    MeasureOptions,
    Measurer,
    factors_of,
    most_tokens,
)
from tl_headnorm.model.loading import Model
from tl_headnorm.run.fingerprints import of_run
from tl_headnorm.run.log import InMemory, RunLog, Work, on_disk
from tl_headnorm.run.record import now, versions
from tl_headnorm.run.results import add_samples, build
from tl_headnorm.run.resume import STATE
from tl_headnorm.run.segments import Column
from tl_headnorm.settings import Settings
from tl_headnorm.stats import Moments


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
        run = collect_into(InMemory(), model, questions, settings, progress=progress)
    else:
        with on_disk(Path(state_dir) / STATE, settings.checkpoint_every) as log:
            run = collect_into(log, model, questions, settings, progress=progress)
    assert run is not None  # one process alone gets it
    return run


def collect_into(
    log: RunLog,
    model: Model,
    questions: Sequence[Question],
    settings: Settings,
    *,
    progress: bool = True,
) -> xr.Dataset | None:
    """Measure every head over the questions; the Dataset, or None in ranks other than the first.

    1 prepare prompts  2 plan batches  3 measure each batch  4 build the run.
    """
    # 1 prepare prompts
    prompts = log.ranks.agree(lambda: prepare(model.tokenizer, model.n_ctx, questions, settings))
    samples, options = prompts.encoded, options_of(settings, questions)
    # 2 plan batches: the same ones in every session and rank, whatever memory is free
    share = 1 if model.device.type == "cuda" else log.ranks.local_world_size
    tokens = log.settled("max_batch_tokens", lambda: batch_tokens(model, samples, options, share))
    plan = plan_batches(model, samples, replace(options, max_batch_tokens=tokens))
    n_stored = len(samples) if settings.per_sample else settings.validate_samples
    identity = of_run(model, prompts, options, plan)
    made_by = {**versions(), "device": model.device.type}
    columns = columns_of(model, options, n_stored)
    log.begin(Work(columns, len(samples), len(plan), identity, made_by))
    # 3 measure each batch
    measure(log, model, samples, plan, options, names=[q.id for q in questions], progress=progress)
    # 4 build the run
    gathered = log.gather()
    if gathered is None:
        return None
    record = record_of(model, prompts, settings, options, log.spent())
    values = {name: gathered.values[name] for name in gathered.moments}
    run = build(values if settings.per_sample else {}, gathered.moments, record)
    predicted = gathered.values["predicted"] if options.score else np.full(len(samples), -1)
    add_samples(run, questions, samples, predicted)
    warn_missing(run)
    if settings.validate_samples:
        validate(model, values, samples, settings, run)
    run.attrs["finished_at"] = now()
    return run


@torch.inference_mode()
def measure(
    log: RunLog,
    model: Model,
    samples: Sequence[Encoded],
    plan: Sequence[Planned],
    options: MeasureOptions,
    *,
    names: Sequence[str] = (),
    factors: Factors | None = None,
    progress: bool = False,
) -> None:
    """Measure the planned batches into the log; a row is a sample's place in `samples`.

    Raises InputError at a value that is not finite, with layer, head and sample.
    """
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    factors = factors or factors_of(model)
    group, measurer = None, None
    for batch in with_bar(log, plan, progress):
        if measurer is None or batch.group is not group:
            group = batch.group
            measurer = Measurer(model, factors, options, group.prefix)
        for part, found in halving_on_oom(batch.samples, measurer):
            rows = [row_of[sample.index] for sample in part]
            check_finite(found, part, options, [names[r] if names else str(r) for r in rows])
            log.add(rows, {**found.values, "predicted": found.predicted})


def batch_tokens(
    model: Model, samples: Sequence[Encoded], options: MeasureOptions, share: int = 1
) -> int:
    """Padded tokens per pass: the setting or, of what fits into memory, one part of `share`."""
    most = most_tokens(model, options, max(map(len, samples), default=1))
    return max(1, most // share) if options.max_batch_tokens == "auto" else most


def plan_batches(
    model: Model, samples: Sequence[Encoded], options: MeasureOptions
) -> list[Planned]:
    """The batches of a run; `max_batch_tokens` auto goes by the memory that is free now."""
    shared = options.share_prefix and model.engine.shares_prefix
    groups = prefix_groups(samples) if shared else [Group(tuple(samples), 0)]
    tokens = batch_tokens(model, samples, options)
    return plan_run(groups, options.batch_size, tokens, sort=options.sort)


def columns_of(model: Model, options: MeasureOptions, n_stored: int | None) -> list[Column]:
    """The values of a sample: every measure [layer, head] and the predicted option."""
    shape = (model.info.n_layers, model.info.n_heads)
    predicted = [Column("predicted", dtype="<i2", moments=False)] if options.score else []
    return [*(Column(m.name, shape, stored=n_stored) for m in options.measures), *predicted]


def with_bar(log: RunLog, plan: Sequence[Planned], shown: bool) -> Iterator[Planned]:
    """The remaining batches under a bar on stderr that counts samples and tokens/s."""
    n_ranks, total = log.ranks.world_size, sum(len(batch.samples) for batch in plan)
    left = sum(len(batch.samples) for batch in log.missing(plan))
    before = total - left if n_ranks == 1 else 0
    title = "collect" if n_ranks == 1 else f"collect (process 1 of {n_ranks})"
    started, tokens = time.perf_counter(), 0
    with tqdm(
        total=before + left, initial=before, unit="sample", desc=title,
        disable=not (shown and log.ranks.first),
    ) as bar:  # fmt: skip
        for batch in log.remaining(plan):
            yield batch
            tokens += sum(len(sample) for sample in batch.samples)
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(batch.samples))


def check_finite(
    found: Found, samples: Sequence[Encoded], options: MeasureOptions, names: Sequence[str]
) -> None:
    """NaN stands for a layer whose hook did not fire, or a prompt too short for the measure;
    anywhere else it is an error."""
    for measure in options.measures:
        value = found.values[measure.name]
        bad = ~np.isfinite(value)
        bad[:, list(found.missing)] = False
        bad[[len(sample) < measure.least_tokens for sample in samples]] = False
        if bad.any():
            row, layer, head = np.argwhere(bad)[0]
            raise InputError(
                f"{measure.name}: expected finite values, found {value[row, layer, head]} in "
                f"layer {layer}, head {head} of sample {names[row]}; try --dtype fp32, or check "
                "the weights"
            )


@dataclass
class Measured:
    """Per-sample values [sample, layer, head] and moments by measure; predictions by sample."""

    values: dict[str, np.ndarray]
    moments: dict[str, Moments]
    predicted: Int[np.ndarray, " sample"]


def measure_samples(
    model: Model,
    samples: Sequence[Encoded],
    *,
    progress: bool = False,
    names: Sequence[str] = (),
    factors: Factors | None = None,
    log: RunLog | None = None,
    **options: Any,
) -> Measured:
    """Measure tokenised prompts; values come back in their order, whatever the batches were.

    `options` takes the fields of MeasureOptions. For studies that need the norms on the way.
    """
    chosen, log = MeasureOptions(**options), log or InMemory()
    plan = plan_batches(model, samples, chosen)
    log.begin(Work(columns_of(model, chosen, None), len(samples), len(plan)))
    measure(log, model, samples, plan, chosen, names=names, factors=factors, progress=progress)
    gathered = log.gather()
    assert gathered is not None  # one process alone
    values = {name: gathered.values[name] for name in gathered.moments}
    predicted = gathered.values["predicted"] if chosen.score else np.full(len(samples), -1)
    return Measured(values, gathered.moments, predicted.astype(np.int64))
