"""The heart: every head's norms for every sample of a dataset, and their running moments."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_headnorm.data.plan import Group, Planned, plan_run, prefix_groups
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import halving_on_oom
from tl_headnorm.errors import InputError
from tl_headnorm.measures.measurer import Factors, Found, How, Measurer, factors_of, most_tokens
from tl_headnorm.model.loading import Model
from tl_headnorm.stats import Moments


@dataclass
class Collected:
    """Per-sample values [sample, layer, head] and moments by measure; predictions by sample.

    The values are arrays, or the store they were written to.
    """

    values: Mapping[str, Any]
    moments: dict[str, Moments]
    predicted: Int[np.ndarray, " sample"]


@runtime_checkable
class Receives(Protocol):
    """What measured values go into: `Collected`, or a share of a run whose state is kept."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    @property
    def moments(self) -> dict[str, Moments]: ...

    @property
    def predicted(self) -> Int[np.ndarray, " sample"]: ...


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
    with Progress(len(samples), progress) as bar:
        measure_planned(
            model, plan, samples, out, options, factors=factors, names=names, done=bar.step
        )
    return out


def plan_samples(model: Model, samples: Sequence[Encoded], how: How) -> list[Planned]:
    """The batches of a run; `max_batch_tokens` auto goes by the memory that is free now."""
    most = most_tokens(model, how, max(map(len, samples), default=1))
    shared = how.share_prefix and model.engine.shares_prefix
    groups = prefix_groups(samples) if shared else [Group(tuple(samples), 0)]
    return plan_run(groups, how.batch_size, most, sort=how.sort)


@torch.inference_mode()
def measure_planned(
    model: Model,
    plan: Sequence[Planned],
    samples: Sequence[Encoded],
    out: Receives,
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
        for part, found in halving_on_oom(planned.samples, measurer.of_prompts):
            rows = [row_of[sample.index] for sample in part]
            _check(found, part, how, [names[r] if names else str(r) for r in rows])
            for name, value in found.values.items():
                out.moments[name].update(value)
                if name in out.values:
                    out.values[name][rows] = value
            out.predicted[rows] = found.predicted
        done(planned)


class Progress:
    """A bar on stderr that counts samples and shows tokens/s; `before` were measured earlier."""

    def __init__(self, total: int, shown: bool, *, before: int = 0, title: str = "collect") -> None:
        self.bar = tqdm(total=total, initial=before, unit="sample", disable=not shown, desc=title)
        self.started, self.tokens = time.perf_counter(), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, planned: Planned) -> None:
        self.tokens += sum(len(sample) for sample in planned.samples)
        rate = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(len(planned.samples))


def _check(found: Found, batch: Sequence[Encoded], how: How, names: Sequence[str]) -> None:
    """NaN stands for a layer whose hook did not fire, or a prompt too short for the measure;
    anywhere else it is an error."""
    for measure in how.measures:
        value = found.values[measure.name]
        bad = ~np.isfinite(value)
        bad[:, list(found.missing)] = False
        bad[[len(sample) < measure.least_tokens for sample in batch]] = False
        if bad.any():
            row, layer, head = np.argwhere(bad)[0]
            raise InputError(
                f"{measure.name}: expected finite values, found {value[row, layer, head]} in "
                f"layer {layer}, head {head} of sample {names[row]}; try --dtype fp32, or check "
                "the weights"
            )
