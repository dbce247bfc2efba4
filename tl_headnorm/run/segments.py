"""Finished units of work: in memory, in segment files, and gathered into one array per column."""

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int, Shaped

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.run.files import write_with
from tl_headnorm.stats import Moments

PARTS = ("n", "mean", "M2")


@dataclass(frozen=True)
class Column:
    """A named value of every row, an array of `shape`.

    Of the rows the first `stored` are stored (None: all), as `dtype`; with `moments` the moments
    over all rows are, in float64 ([1] of a column of single numbers).
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "<f4"
    stored: int | None = None
    moments: bool = True

    def n_stored(self, n_rows: int) -> int:
        """How many of `n_rows` rows are stored."""
        return n_rows if self.stored is None else min(self.stored, n_rows)

    def is_stored(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which of these rows are stored."""
        return np.asarray(rows, np.int64) < (np.inf if self.stored is None else self.stored)


@dataclass
class Unit:
    """The result of one unit of work: the numbers of its rows, their values, their moments."""

    number: int
    rows: list[int] = field(default_factory=list)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    def add(
        self, columns: Iterable[Column], rows: Sequence[int], values: Mapping[str, np.ndarray]
    ) -> None:
        """Add some of its rows, every column of them."""
        self.rows += map(int, rows)
        for column in columns:
            array = np.asarray(values[column.name])
            stored = array[column.is_stored(rows)].astype(column.dtype)
            self.values.setdefault(column.name, []).append(stored)
            if column.moments:
                empty = Moments.empty(column.shape or (1,))
                self.moments.setdefault(column.name, empty).update(
                    array.reshape(-1, *empty.n.shape)
                )

    @property
    def nbytes(self) -> int:
        """Bytes of its values and moments."""
        moments = [getattr(m, part) for m in self.moments.values() for part in PARTS]
        return sum(a.nbytes for arrays in (*self.values.values(), moments) for a in arrays)


def write_segment(
    path: Path, columns: Sequence[Column], units: Sequence[Unit], **facts: int | float
) -> None:
    """Write finished units in one file, atomically; `facts` are numbers about how they came."""
    arrays: dict[str, Any] = {f"_{name}": value for name, value in facts.items()}
    arrays |= {
        "_units": [unit.number for unit in units],
        "_sizes": [len(unit.rows) for unit in units],
        "_rows": [row for unit in units for row in unit.rows],
    }
    for column in columns:
        name = column.name
        arrays[name] = np.concatenate([part for unit in units for part in unit.values[name]])
        for part in PARTS if column.moments else ():
            arrays[f"{name}_{part}"] = np.stack([getattr(u.moments[name], part) for u in units])
    write_with(path, lambda stream: np.savez(stream, **arrays))


def units_of(path: Path) -> list[int]:
    """The numbers of a segment's units. Raises InputError where the file is damaged."""
    with _opened(path) as stored:
        return [int(number) for number in stored["_units"]]


def read_segment(path: Path, columns: Sequence[Column]) -> tuple[list[Unit], dict[str, float]]:
    """A segment's units and facts. Raises InputError where the file is damaged."""
    with _opened(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
        facts = {name[1:]: float(array) for name, array in arrays.items() if array.ndim == 0}
        ends = np.cumsum(arrays["_sizes"])[:-1]
        rows = np.split(arrays["_rows"], ends)
        units = [
            Unit(int(number), [int(row) for row in own])
            for number, own in zip(arrays["_units"], rows, strict=True)
        ]
        for column in columns:
            name, stored_rows = column.name, column.is_stored(arrays["_rows"])
            if arrays[name].shape != (stored_rows.sum(), *column.shape):
                raise ValueError(f"{name} has another shape")
            places = np.cumsum([0, *(column.is_stored(own).sum() for own in rows)])
            for i, unit in enumerate(units):
                unit.values[name] = [arrays[name][places[i] : places[i + 1]]]
                if column.moments:
                    parts = [arrays[f"{name}_{part}"][i] for part in PARTS]
                    unit.moments[name] = Moments(*parts)
    return units, facts


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # np.load would leave the file of a damaged archive open.
        with path.open("rb") as stream, np.load(stream) as stored:
            yield stored
    except Exception as error:  # damaged archives fail in many ways
        raise InputError(
            f"resume: expected {path} as collect wrote it, found it damaged ({first_line(error)}); "
            "remove it to measure its part again"
        ) from error


class RowFile:
    """An array [n_rows, ...] in an unnamed file of `folder`, filled row by row in any order.

    Plain writes, for a full disk is then an error (written through a map it ends the process), and
    pages of a map would count as resident memory. The file goes with its last reader.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.file.close)

    def __setitem__(
        self, rows: Int[np.ndarray, " row"], values: Shaped[np.ndarray, "row ..."]
    ) -> None:
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        for row, value in zip(rows, np.ascontiguousarray(values, self.dtype), strict=True):
            if not 0 <= row < self.shape[0]:
                raise IndexError(f"row {row} of {self.shape[0]}")
            left, offset = memoryview(value.tobytes()), int(row) * size
            while left:  # a disk about to be full takes a part, and says so only by the count
                done = os.pwrite(self.file.fileno(), left, offset)
                left, offset = left[done:], offset + done

    def array(self) -> np.ndarray:
        """All rows, read from disk as they are used; those never written are 0."""
        if 0 in self.shape:  # an empty file cannot be mapped
            return np.zeros(self.shape, self.dtype)
        self.file.truncate(self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64)))
        return np.memmap(self.file, self.dtype, "r", shape=self.shape)


class Gathered:
    """Every row of a run: values by column in the order of the rows, and moments.

    Values are in memory or, with `folder`, in unnamed files there. A unit counts once.
    """

    def __init__(self, columns: Sequence[Column], n_rows: int, folder: Path | None = None) -> None:
        self.columns, self.units = columns, set[int]()
        self.moments = {c.name: Moments.empty(c.shape or (1,)) for c in columns if c.moments}
        self._arrays: dict[str, Any] = {}
        for column in columns:
            shape = (column.n_stored(n_rows), *column.shape)
            self._arrays[column.name] = (
                np.zeros(shape, column.dtype)
                if folder is None
                else RowFile(folder, shape, column.dtype)
            )

    def add(self, unit: Unit) -> None:
        """Add a unit's rows, unless it is there already."""
        if unit.number in self.units:
            return
        self.units.add(unit.number)
        rows = np.array(unit.rows, np.int64)
        for column in self.columns if len(rows) else ():
            name = column.name
            self._arrays[name][rows[column.is_stored(rows)]] = np.concatenate(unit.values[name])
            if column.moments:
                self.moments[name] = self.moments[name].merge(unit.moments[name])

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """By column, [row, ...] of the rows that are stored; to be asked for when all are added."""
        return {
            name: array.array() if isinstance(array, RowFile) else array
            for name, array in self._arrays.items()
        }
