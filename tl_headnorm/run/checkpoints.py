"""What a run has measured so far, kept on disk: after any end it goes on where it was.

A run's batches are planned before the first one and numbered. Every process keeps which of them
it has finished, with their moments, in a file that is replaced whole; per-sample values go in
place to files beside it, which therefore may be ahead of it and never behind. A batch that was at
work when a process ended is measured again, alike: it is made of the same prompts.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tl_headnorm.data.plan import Planned
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.files import write_json, write_with
from tl_headnorm.run.ranks import PATIENCE, Ranks
from tl_headnorm.run.signals import Stop
from tl_headnorm.run.store import RowFile
from tl_headnorm.stats import Moments

RECORD, LOCK = "run.json", "lock"
# Digest and where it was found, by what it is of.
Identity = Mapping[str, Sequence[str]]
# What a resumed run must find as it was: the setting that leads to it, and its name.
IDENTITY = {
    "data": ("data_dir", "the questions' file"),
    "shape": ("model_path", "the model's shape, data type and engine"),
    "config": ("model_path", "the model's config"),
    "weights": ("model_path", "the model's weights"),
    "prompts": ("template", "the prompts' tokens and answers"),
    "measures": ("measures", "the measures"),
    "batches": ("batch_size", "the batches"),
}


@dataclass(frozen=True)
class Layout:
    """The sizes of what is kept of a run; `rows` per-sample values are, from the first on."""

    batches: int
    samples: int
    rows: int
    layers: int
    heads: int
    measures: tuple[str, ...]
    scored: bool


class FirstRows:
    """The first rows of a file of per-sample values; what is written beyond them is dropped."""

    def __init__(self, file: RowFile) -> None:
        self.file = file

    def __setitem__(self, rows: Sequence[int], values: np.ndarray) -> None:
        kept = [i for i, row in enumerate(rows) if row < self.file.shape[0]]
        self.file[[rows[i] for i in kept]] = values[kept]


class Share:
    """What one process has measured: finished batches, their moments and per-sample values."""

    def __init__(self, folder: Path, rank: int, layout: Layout) -> None:
        """Go on with what is there, or begin; InputError where it is damaged."""
        self.path, self.layout = folder / f"{rank:05d}.npz", layout
        old = self.path.exists()
        rows = (layout.rows, layout.layers, layout.heads)
        names = layout.measures if layout.rows else ()
        self.files = {
            name: RowFile(folder / f"{rank:05d}.{name}.npy", rows, reopen=old) for name in names
        }
        self.values = {name: FirstRows(file) for name, file in self.files.items()}
        guesses = folder / f"{rank:05d}.predicted.npy"
        self.predicted: Any = (
            RowFile(guesses, (layout.samples,), "<i2", reopen=old)
            if layout.scored
            else np.full(layout.samples, -1)
        )
        self.done = np.zeros(layout.batches, bool)
        self.moments = {
            name: Moments.empty((layout.layers, layout.heads)) for name in layout.measures
        }
        self.seconds, self.peak_memory, self.saved = 0.0, 0, 0
        if old:
            self._load()
        else:
            self.save()

    def _load(self) -> None:
        try:
            with self.path.open("rb") as stream, np.load(stream) as stored:
                arrays = {name: stored[name] for name in stored.files}
            done = np.unpackbits(arrays["done"], count=self.layout.batches).astype(bool)
            for name, empty in self.moments.items():
                parts = [arrays[f"{name}_{part}"] for part in ("n", "mean", "M2")]
                if any(part.shape != empty.mean.shape for part in parts):
                    raise ValueError(f"{name} has another shape")
                self.moments[name] = Moments(*parts)
            self.seconds, self.peak_memory = float(arrays["seconds"]), int(arrays["peak_memory"])
        except Exception as error:  # damaged archives fail in many ways
            raise InputError(
                f"resume: expected {self.path} as collect wrote it, found it damaged "
                f"({first_line(error)}); remove it to measure its part again"
            ) from error
        self.done, self.saved = done, int(done.sum())

    def save(self) -> None:
        """Replace the file; the rows it speaks of reach the disk before it."""
        for file in self._row_files():
            file.sync()
        arrays: dict[str, Any] = {
            f"{name}_{part}": getattr(moment, part)
            for name, moment in self.moments.items()
            for part in ("n", "mean", "M2")
        }
        arrays.update(
            done=np.packbits(self.done), seconds=self.seconds, peak_memory=self.peak_memory
        )
        write_with(self.path, lambda stream: np.savez(stream, **arrays))
        self.saved = int(self.done.sum())

    def take_over(self, other: "Share", rows: Sequence[int]) -> None:
        """Add what another process measured: its batches, and its values in these rows."""
        self.done |= other.done
        self.moments = {n: m.merge(other.moments[n]) for n, m in self.moments.items()}
        self.seconds = max(self.seconds, other.seconds)
        self.peak_memory = max(self.peak_memory, other.peak_memory)
        for name, values in self.values.items():
            array = other.files[name].array()
            kept = [row for row in rows if row < len(array)]
            for start in range(0, len(kept), 256):
                part = kept[start : start + 256]
                values[part] = array[part]
        if self.layout.scored:
            self.predicted[rows] = other.predicted.array()[list(rows)]

    def _row_files(self) -> Iterator[RowFile]:
        yield from self.files.values()
        if isinstance(self.predicted, RowFile):
            yield self.predicted

    def close(self) -> None:
        for file in self._row_files():
            file.close(delete=False)


@dataclass
class Kept:
    """What a finished run kept, of all its processes; values as arrays read from disk."""

    values: dict[str, np.ndarray]
    moments: dict[str, Moments]
    predicted: np.ndarray


@dataclass
class Keeper:
    """Keeps a run in `folder`, every `every` seconds (0: after every batch), and continues it."""

    folder: Path
    every: float = 60.0
    ranks: Ranks = field(default_factory=Ranks)
    stop: Stop = field(default_factory=Stop)
    began: float = field(default_factory=time.monotonic)

    def recorded(self) -> dict[str, Any] | None:
        """What the run's first beginning wrote down; None where this is it."""
        path = self.folder / RECORD
        return self.ranks.from_first(lambda: _record_of(path))

    def begin(self, layout: Layout, identity: Identity, facts: Mapping[str, Any]) -> None:
        """Write down what the run is, or check that it is the one to continue.

        `facts` are those a later process must take over. Raises InputError where the data, the
        model or the prompts are others than at the start, or differ between the processes.
        """
        now = {**asdict(layout), "measures": list(layout.measures)}
        recorded = self.recorded()
        everyones = self.ranks.everyones(identity)

        def check() -> None:
            if recorded is not None:
                _check(recorded["identity"], identity, "as when the run began")
                if recorded["layout"] != now:
                    raise InputError(
                        f"resume: expected what is kept as at the start ({recorded['layout']}), "
                        f"found {now}; start a new run"
                    )
            _check(everyones[0], identity, "alike for all processes")

        self.ranks.together(check)
        facts = recorded["facts"] if recorded else facts
        sessions = 1 + (recorded["sessions"] if recorded else 0)
        record = {"identity": identity, "layout": now, "facts": facts, "sessions": sessions}
        self.ranks.from_first(lambda: write_json(self.folder / RECORD, record))
        self.layout, self.facts, self.sessions = layout, dict(facts), sessions
        # Nobody measures before all that was finished is known.
        self.finished = self.ranks.from_first(lambda: self._finished())
        self.share = self.ranks.together(lambda: Share(self.folder, self.ranks.rank, layout))
        self._saved_at = time.monotonic()
        self._before = self.share.seconds

    def _others(self) -> Iterator[Share]:
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            if int(path.stem) != self.ranks.rank:
                yield Share(self.folder, int(path.stem), self.layout)

    def _finished(self) -> np.ndarray:
        found = np.zeros(self.layout.batches, bool)
        for path in self.folder.glob("[0-9]*.npz"):
            share = Share(self.folder, int(path.stem), self.layout)
            found |= share.done
            share.close()
        return found

    def mine(self, plan: Sequence[Planned]) -> list[Planned]:
        """The batches left for this process: of all that are left every N-th, so that long and
        short ones are shared alike."""
        left = [planned for planned in plan if not self.finished[planned.number]]
        return left[self.ranks.rank :: self.ranks.world]

    def done(self, number: int) -> None:
        """A batch is finished; save if it is time, and stop if that was asked for."""
        self.share.done[number] = True
        if self.stop.signum is not None:
            self.save()
            self.stop.check()
        if time.monotonic() - self._saved_at >= self.every:
            self.save()

    def save(self) -> None:
        self.share.seconds = self._before + time.monotonic() - self.began
        self.share.save()
        self._saved_at = time.monotonic()

    def gather(self, plan: Sequence[Planned], row_of: Mapping[int, int]) -> Kept | None:
        """Wait for all processes and put together what they have; None but for rank 0."""
        self.save()
        own = self.share
        # Of equal shares, none takes much more than twice as long as another.
        self.ranks.wait(PATIENCE + timedelta(seconds=time.monotonic() - self.began))
        if not self.ranks.first:
            own.close()
            return None
        for other in self._others():
            rows = [row_of[s.index] for p in plan if other.done[p.number] for s in p.samples]
            own.take_over(other, sorted(rows))
            other.close()
        if not own.done.all():
            raise RuntimeError(f"{(~own.done).sum()} of {len(own.done)} batches are missing")
        predicted = own.predicted.array() if self.layout.scored else own.predicted
        values = {name: file.array() for name, file in own.files.items()}
        own.close()
        return Kept(values, own.moments, np.array(predicted, int))

    def close(self) -> None:
        """Let go of the files, as they are."""
        if hasattr(self, "share"):
            self.share.close()

    def spent(self) -> dict[str, Any]:
        """What the run took in all, for its record; measuring was the slowest process's time."""
        return {
            "started_at": self.facts["started_at"],
            "wall_seconds": self.share.seconds,
            "peak_memory_bytes": self.share.peak_memory,
            "processes": self.ranks.world,
            "sessions": self.sessions,
        }


def _record_of(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("identity", "layout", "facts", "sessions")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"resume: expected {path} as collect wrote it, found it damaged "
            f"({first_line(error)}); start a new run"
        ) from error


def _check(expected: Identity, found: Identity, when: str) -> None:
    for key, (setting, what) in IDENTITY.items():
        (old, where), (new, here) = expected[key], found[key]
        if old != new:
            raise InputError(
                f"{setting}: expected {what} {when} ({old[:12]}, {where}), found others "
                f"({new[:12]}, {here}); put them back, or start a new run"
            )


@contextmanager
def locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold the run's lock, which ends with the process however it ends.

    `alone`: raise InputError where any process still works on the run. Where the file system
    knows no locks there is none.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if alone:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise InputError(
                    f"resume: expected a run that no process works on, found {folder.parent} in "
                    "use; wait for its end, or stop it"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)
