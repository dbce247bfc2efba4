"""The runner: samples under interventions, and a metric of every run.

What the runs of a batch share is computed once: the clean run leaves, for every layer at which
an intervention begins, the residual before it and its z (see cached_run.py), and interventions
that begin at the same layer are stacked along the batch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_headnorm.data.plan import Group, plan_batches
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import auto_batch_tokens, halving_on_oom
from tl_headnorm.engine.protocol import Hook
from tl_headnorm.interventions.cached_run import CachedRun
from tl_headnorm.interventions.intervention import Intervention, Rows
from tl_headnorm.interventions.metrics import Metric
from tl_headnorm.interventions.replacements import Reference
from tl_headnorm.model.loading import Model
from tl_headnorm.run.fingerprints import of_runs
from tl_headnorm.run.log import InMemory, RunLog, Work
from tl_headnorm.run.segments import Column
from tl_headnorm.run.stages import stage_log
from tl_headnorm.settings import Settings

# Past this many tokens a pass is no faster per token, and its activations leave the cache.
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
# By name, [run, sample, ...]; run 0 is the clean one, run i the i-th intervention's.
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Unit:
    """A batch and the numbers of the runs done with it at once (0: clean, i: intervention i)."""

    number: int
    samples: tuple[Encoded, ...]
    runs: tuple[int, ...]

    @property
    def n_runs(self) -> int:
        """Runs of single samples."""
        return len(self.samples) * len(self.runs)


@torch.no_grad()
def run(
    model: Model,
    samples: Sequence[Encoded],
    interventions: Sequence[Intervention],
    metric: Metric,
    *,
    settings: Settings | None = None,
    reference: Reference | None = None,
    base: Intervention | None = None,
    chained: bool = False,
    share: bool = True,
    log: RunLog | None = None,
    progress: str | None = None,
) -> Values:
    """The metric of the clean run and of every intervention, for all samples in their order.

    `settings`: batch size, tokens per pass, padding side, seed. `reference` is where replaced
    activations come from. `base` is in place in every run, the clean one included. `chained`:
    each intervention starts from the run before it instead of the clean one, and its first layer
    is the first in which it differs from that run. `share=False` runs the whole model each time.

    1 plan units: a batch of samples and a stack of runs  2 run what the log lacks, halving what
    does not fit in memory  3 gather the values by run and sample.
    """
    settings = settings or Settings()
    # 1
    log = log or stage_log(sum(map(len, samples)) * (1 + len(interventions)))
    # The same units in every session, whatever memory is free.
    most = log.settled("max_batch_tokens", lambda: most_tokens(model, settings))
    units = plan(samples, interventions, settings, most, chained)
    log.begin(_work(log, model, samples, interventions, metric, units))
    # 2
    runs = _Runs(model, interventions, metric, settings, reference, base, chained, share)
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    total = sum(unit.n_runs for unit in log.missing(units))
    with tqdm(total=total, unit="run", disable=progress is None, desc=progress) as bar:
        for unit in log.remaining(units):
            values = runs.measure(unit.samples, unit.runs)
            rows = [row_of[sample.index] for sample in unit.samples]
            places = [run * len(samples) + row for run in unit.runs for row in rows]
            log.add(places, {k: v.reshape(-1, *v.shape[2:]) for k, v in values.items()})
            bar.update(unit.n_runs)
    # 3
    gathered = log.gather()
    assert gathered is not None, "a study runs in one process"
    shape = (1 + len(interventions), len(samples))
    return {k: np.array(v).reshape(*shape, *v.shape[1:]) for k, v in gathered.values.items()}


def _work(
    log: RunLog, model: Model, samples: Sequence[Encoded],
    interventions: Sequence[Intervention], metric: Metric, units: Sequence[Unit],
) -> Work:  # fmt: skip
    """Columns and rows [run, sample] of a log, and what a resumed run must find as it was."""
    shapes = metric.shapes(model.info.n_layers, model.info.n_heads)
    columns = [Column(name, shape, "<f8", moments=False) for name, shape in shapes.items()]
    identity = {}
    if not isinstance(log, InMemory):
        names = ["clean", *(one.name for one in interventions)]
        identity = of_runs(model, samples, names, [(u.samples, u.runs) for u in units])
    return Work(columns, (1 + len(interventions)) * len(samples), len(units), identity)


def most_tokens(model: Model, settings: Settings) -> int:
    """Padded tokens per pass: the setting, or what fits and still gains speed."""
    if settings.max_batch_tokens != "auto":
        return int(settings.max_batch_tokens)
    return min(auto_batch_tokens(model), MOST_TOKENS.get(model.device.type, 16384))


def plan(
    samples: Sequence[Encoded],
    interventions: Sequence[Intervention],
    settings: Settings,
    most: int,
    chained: bool = False,
) -> list[Unit]:
    """Batches of similar length, and for each the stacks of runs that fit into `most` tokens."""
    stackable: dict[tuple[int | None, str], list[int]] = defaultdict(list, {(None, ""): [0]})
    for number, one in enumerate(interventions, 1):
        stackable[one.first_layer, "" if one.first_layer is None else one.kind].append(number)
    units: list[Unit] = []
    for batch in plan_batches(Group(tuple(samples), 0), settings.batch_size, most):
        width = max(1, most // (len(batch) * max(map(len, batch))))
        stacks = [tuple(range(1 + len(interventions)))]
        if not chained:
            stacks = [s for runs in stackable.values() for s in _cut(runs, width)]
        units += [Unit(len(units) + i, batch, runs) for i, runs in enumerate(stacks)]
    return units


def _cut(runs: Sequence[int], width: int) -> Iterator[tuple[int, ...]]:
    for first in range(0, len(runs), width):
        yield tuple(runs[first : first + width])


@dataclass
class _Runs:
    """The runs of all interventions, one unit at a time."""

    model: Model
    interventions: Sequence[Intervention]
    metric: Metric
    settings: Settings
    reference: Reference | None
    base: Intervention | None
    chained: bool
    share: bool

    def __post_init__(self) -> None:
        self.model.tl.requires_grad_(False)
        self.starts = {v.first_layer for v in self.interventions if v.first_layer is not None}
        self.everywhere = any(v.everywhere for v in self.interventions)
        self.cached: tuple[tuple[Encoded, ...], CachedRun] | None = None

    def measure(self, samples: tuple[Encoded, ...], runs: tuple[int, ...]) -> Values:
        """Values [run, sample, ...]; what does not fit is halved, a stack first, then the batch."""

        def of_stack(part: tuple[int, ...]) -> Values:
            if len(part) > 1 and not self.chained:
                return self._values(samples, part)
            each = halving_on_oom(samples, lambda batch: self._values(batch, part))
            return _joined([values for _, values in each], 1)

        if self.chained:
            return of_stack(runs)
        return _joined([values for _, values in halving_on_oom(runs, of_stack, 1)], 0)

    def _values(self, samples: tuple[Encoded, ...], runs: tuple[int, ...]) -> Values:
        clean = self._clean(samples)
        if self.chained:
            resid = clean.resid
            return _joined([self._advanced(clean, number, resid) for number in runs], 0)
        chosen = [self._intervention(number) for number in runs]
        first = None if chosen[0] is None else chosen[0].first_layer
        rows = [clean.rows.under(v, clean.rows.found) for v in chosen]
        if first is None:  # nothing changed: the clean run itself, bit for bit
            return self._measured(rows, [clean.resid] * len(rows), clean.resid)
        resid = clean.stack([self._hooks(one) for one in rows], first)
        return self._measured(rows, resid, clean.resid)

    def _intervention(self, number: int) -> Intervention | None:
        return self.interventions[number - 1] if number else None

    def _hooks(self, rows: Rows) -> list[Hook]:
        changes = [] if rows.intervention is None else rows.intervention.hooks(rows)
        return [*changes, *self.metric.hooks(rows)]

    def _clean(self, samples: tuple[Encoded, ...]) -> CachedRun:
        """The batch's clean run; a chain of runs changes it, so each gets its own."""
        if self.cached is not None and self.cached[0] == samples and not self.chained:
            return self.cached[1]
        self.cached = None  # its memory is free before the next one is made
        # A bridge's own mask handling is only relied on where padding cannot come before a token.
        side = self.settings.padding_side if self.model.engine.starts_late else "right"
        rows = Rows.pad(self.model, samples, side, reference=self.reference,
                        seed=self.settings.seed)  # fmt: skip
        made = CachedRun(
            rows, starts=self.starts, last_only=self.metric.last_only,
            base=self.base.hooks(rows) if self.base else (), readers=self.metric.hooks(rows),
            everywhere=self.everywhere, share=self.share,
        )  # fmt: skip
        self.cached = samples, made
        return made

    def _advanced(self, state: CachedRun, number: int, clean: Tensor) -> Values:
        """The values of a run that starts from the one before it."""
        intervention = self._intervention(number)
        rows = state.rows.under(intervention, state.rows.found)
        if intervention is not None and intervention.first_layer is not None:
            state.advance(self._hooks(rows), intervention.first_layer)
        return self._measured([rows], [state.resid], clean)

    def _measured(
        self, rows: Sequence[Rows], resid: Sequence[Tensor] | Tensor, clean: Tensor
    ) -> Values:
        found = self.metric(rows, list(resid), clean)
        return {name: value.double().cpu().numpy() for name, value in found.items()}


def _joined(parts: Sequence[Values], axis: int) -> Values:
    return {name: np.concatenate([p[name] for p in parts], axis) for name in parts[0]}
