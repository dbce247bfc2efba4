"""The run log: work done in numbered units, so that it can be interrupted, resumed and shared.

A run's units (a batch of samples, or a batch times a stack of interventions) are known and
numbered before the first one runs. `remaining` yields those that are left for this process, `add`
takes the values of a unit's rows, `gather` returns the values of all rows. In memory, on disk,
and in several ranks on disk the protocol is the same.

On disk (`.state` in the run directory) the state is

    run.json                  what the run is: fingerprints of what its numbers depend on, columns
                              and rows, facts settled when it began, the number of sessions
    lock                      held by every process at work (flock)
    UUUUUUUU-RRRR.npz         a segment: the units that rank R finished in one checkpoint interval,
                              named by the first. `_units` [unit], `_sizes` [unit] rows of each,
                              `_rows` [row] their numbers; per column its values [stored row, ...],
                              and `_n`, `_mean`, `_M2` [unit, ...]: the moments of each unit;
                              `_seconds`, `_peak_memory`, `_session`, `_rank`

Segments are written once, under a temporary name that is then changed, and never changed. What is
done is the union of their units; a resumed run does the others. Of N ranks each does every N-th of
them. A unit that was at work when a process ended is done again, with the same numbers: it is made
of the same prompts. A kill loses at most one checkpoint interval. Moments are stored per unit, so
that a unit found in two segments counts once. Gathering reads one segment at a time, in the order
of their first units; the values of all rows then lie in unnamed files, not in memory.
"""

import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.files import locked, plain, write_json
from tl_headnorm.run.ranks import PATIENCE, Ranks
from tl_headnorm.run.record import now, peak_memory_bytes
from tl_headnorm.run.segments import Column, Gathered, Unit, read_segment, units_of, write_segment
from tl_headnorm.run.signals import Stop

RECORD = "run.json"
# A segment is written before its values take more than this in memory.
SEGMENT_BYTES = 16 * 2**20


@runtime_checkable
class Numbered(Protocol):
    """A unit of work, as planned."""

    @property
    def number(self) -> int: ...


U = TypeVar("U", bound=Numbered)


class Fingerprint(NamedTuple):
    """Something a run's numbers depend on: the setting that leads to it, its name, its digest,
    and where it was found."""

    setting: str
    what: str
    digest: str
    where: str


@dataclass(frozen=True)
class Work:
    """What a run measures: its columns, rows and units; fingerprints of what the numbers depend
    on; versions and device, of which a change is only said."""

    columns: Sequence[Column]
    n_rows: int
    n_units: int
    identity: Mapping[str, Fingerprint] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> dict[str, Any]:
        """Columns, rows and units, as JSON holds them."""
        columns = [asdict(column) for column in self.columns]
        return plain({"units": self.n_units, "rows": self.n_rows, "columns": columns})

    @property
    def peak_memory(self) -> int:
        """Most bytes held so far by its device."""
        return peak_memory_bytes(self.made_by.get("device", "cpu"))


@runtime_checkable
class RunLog(Protocol):
    """Work in numbered units, each done once in all sessions and ranks."""

    ranks: Ranks

    def settled(self, name: str, choose: Callable[[], int]) -> int:
        """A number that is the same in all sessions and ranks: as it was when the run began, or
        the least that any rank chooses."""

    def begin(self, work: Work) -> None:
        """Say what is to be measured; must come first. Raises InputError where it differs from
        what the run began with, or between the ranks."""

    def missing(self, units: Sequence[U]) -> list[U]:
        """The units that are left for this process."""

    def remaining(self, units: Sequence[U]) -> Iterator[U]:
        """The same, one after the other; a unit counts as done when the next is asked for."""

    def add(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Add rows of the unit at work: every column's values, the first axis being the rows."""

    def gather(self) -> Gathered | None:
        """The values of all rows, once every rank has done its units; None but for rank 0."""

    def spent(self) -> dict[str, Any]:
        """Start, seconds, peak memory, processes and sessions, for the run's record."""


class InMemory:
    """A log of one process that ends with it."""

    def __init__(self) -> None:
        self.ranks, self.started_at, self._clock = Ranks(), now(), time.perf_counter()

    def settled(self, name: str, choose: Callable[[], int]) -> int:
        return choose()

    def begin(self, work: Work) -> None:
        self.work, self.gathered = work, Gathered(work.columns, work.n_rows)

    def missing(self, units: Sequence[U]) -> list[U]:
        return list(units)

    def remaining(self, units: Sequence[U]) -> Iterator[U]:
        for unit in units:
            self._unit = Unit(unit.number)
            yield unit
            self.gathered.add(self._unit)

    def add(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        self._unit.add(self.work.columns, rows, values)

    def gather(self) -> Gathered:
        return self.gathered

    def spent(self) -> dict[str, Any]:
        return {
            "started_at": self.started_at,
            "wall_seconds": time.perf_counter() - self._clock,
            "peak_memory_bytes": self.work.peak_memory,
            "processes": 1,
            "sessions": 1,
        }


class OnDisk:
    """A log in `folder`, of one process or several, with a segment every `every` seconds (0:
    after every unit)."""

    def __init__(
        self, folder: Path, every: float = 60.0, ranks: Ranks | None = None,
        stop: Stop | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.every = folder, every
        self.ranks, self.stop = ranks or Ranks(), stop or Stop()
        self.facts: dict[str, Any] = {"started_at": now()}
        self._pending: list[Unit] = []
        self._pending_bytes = 0
        self._began = self._saved = time.monotonic()
        path = folder / RECORD
        self._record = self.ranks.broadcast(lambda: _read_record(path))
        if self._record:
            self.facts = self._record["facts"]

    def settled(self, name: str, choose: Callable[[], int]) -> int:
        if name not in self.facts:
            self.facts[name] = min(self.ranks.all_gather(choose()))
        return int(self.facts[name])

    def begin(self, work: Work) -> None:
        first, *_ = self.ranks.all_gather(work.identity)
        self.ranks.agree(lambda: self._check(work, first))
        if self._record and self.ranks.first:
            _warn_of_versions(self.facts["made_by"], work.made_by)
        self.facts.setdefault("made_by", dict(work.made_by))
        self.session = 1 + (self._record["sessions"] if self._record else 0)
        self._record = {
            "identity": work.identity, "layout": work.layout, "facts": self.facts,
            "sessions": self.session,
        }  # fmt: skip
        self.ranks.broadcast(lambda: write_json(self.folder / RECORD, self._record))
        self.work = work
        # No rank measures before all know what is done.
        self.done = self.ranks.broadcast(
            lambda: {unit for path in self.segments() for unit in units_of(path)}
        )

    def _check(self, work: Work, first: Mapping[str, Fingerprint]) -> None:
        if self._record is not None:
            _check_same(self._record["identity"], work.identity, "as when the run began")
            if self._record["layout"] != work.layout:
                raise InputError(
                    f"resume: expected what is kept as at the start ({self._record['layout']}), "
                    f"found {work.layout}; start a new run"
                )
        _check_same(first, work.identity, "alike for all processes")

    def segments(self) -> list[Path]:
        """The segments of all ranks and sessions, by their first units."""
        return sorted(self.folder.glob("[0-9]*.npz"))

    def missing(self, units: Sequence[U]) -> list[U]:
        left = [unit for unit in units if unit.number not in self.done]
        return left[self.ranks.rank :: self.ranks.world_size]

    def remaining(self, units: Sequence[U]) -> Iterator[U]:
        with self.stop.held():
            for unit in self.missing(units):
                self._unit = Unit(unit.number)
                yield unit
                self._pending.append(self._unit)
                self._pending_bytes += self._unit.nbytes
                due = time.monotonic() - self._saved >= self.every
                if due or self._pending_bytes > SEGMENT_BYTES or self.stop.signum is not None:
                    self.write()
                self.stop.check()

    def add(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        self._unit.add(self.work.columns, rows, values)

    def write(self) -> None:
        """Write the units finished since the last segment as a new one."""
        if self._pending:
            path = self.folder / f"{self._pending[0].number:08d}-{self.ranks.rank:04d}.npz"
            moment = time.monotonic()
            write_segment(
                path, self.work.columns, self._pending, seconds=moment - self._saved,
                peak_memory=self.work.peak_memory, session=self.session, rank=self.ranks.rank,
            )  # fmt: skip
            self._pending, self._pending_bytes, self._saved = [], 0, moment

    def gather(self) -> Gathered | None:
        self.write()
        # Of equal shares, none takes much more than twice as long as another.
        self.ranks.barrier(PATIENCE + timedelta(seconds=time.monotonic() - self._began))
        if not self.ranks.first:
            return None
        gathered = Gathered(self.work.columns, self.work.n_rows, self.folder)
        self._seconds: dict[tuple[float, float], float] = defaultdict(float)
        self._peak_memory = 0
        for path in self.segments():
            units, facts = read_segment(path, self.work.columns)
            self._seconds[facts["session"], facts["rank"]] += facts["seconds"]
            self._peak_memory = max(self._peak_memory, int(facts["peak_memory"]))
            for unit in units:
                gathered.add(unit)
        if missing := self.work.n_units - len(gathered.units):
            raise RuntimeError(f"{missing} of {self.work.n_units} batches are missing")
        return gathered

    def spent(self) -> dict[str, Any]:
        """A session's seconds are those of its slowest rank."""
        slowest: dict[float, float] = defaultdict(float)
        for (session, _), seconds in self._seconds.items():
            slowest[session] = max(slowest[session], seconds)
        return {
            "started_at": self.facts["started_at"],
            "wall_seconds": sum(slowest.values()),
            "peak_memory_bytes": self._peak_memory,
            "processes": self.ranks.world_size,
            "sessions": self.session,
        }


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {key: record[key] for key in ("layout", "facts", "sessions")}
        identity = {name: Fingerprint(*given) for name, given in record["identity"].items()}
        return {**found, "identity": identity}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"resume: expected {path} as collect wrote it, found it damaged ({first_line(error)}); "
            "start a new run"
        ) from error


def _check_same(
    expected: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint], when: str
) -> None:
    for key, new in found.items():
        old = expected.get(key, new)
        if old.digest != new.digest:
            raise InputError(
                f"{new.setting}: expected {new.what} {when} ({old.digest[:12]}, {old.where}), "
                f"found others ({new.digest[:12]}, {new.where}); put them back, or start a new run"
            )


def _warn_of_versions(before: Mapping[str, str], versions: Mapping[str, str]) -> None:
    changed = [f"{k} {before.get(k)}, now {v}" for k, v in versions.items() if before.get(k) != v]
    if changed:
        logging.getLogger("tl_headnorm").warning(
            "resumed with %s: the batches that are left may differ in their last digits from what "
            "they would have given",
            "; ".join(changed),
        )


@contextmanager
def on_disk(folder: Path, every: float) -> Iterator[OnDisk]:
    """A log of this process alone, taken up again where the same folder has one; removed when all
    is done."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, alone=True):
        yield OnDisk(folder, every)
        shutil.rmtree(folder)  # gathered values stay readable: their files have no names
