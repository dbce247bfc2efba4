"""Per-sample values on disk: rows written where they belong, never all in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class RowFile:
    """A float32 .npy file [n_rows, ...] written row by row, in any order.

    Plain writes, not a memory map: pages of a map count as resident memory until they are
    dropped.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self.row_bytes = 4 * int(np.prod(shape[1:], dtype=np.int64))
        with path.open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            self.start = stream.tell()
            stream.truncate(self.start + shape[0] * self.row_bytes)
        self.descriptor = os.open(path, os.O_RDWR)

    def __setitem__(self, rows: Sequence[int], values: np.ndarray) -> None:
        for row, value in zip(rows, np.ascontiguousarray(values, "<f4"), strict=True):
            if not 0 <= row < self.shape[0]:
                raise IndexError(f"row {row} of {self.shape[0]}")
            os.pwrite(self.descriptor, value.tobytes(), self.start + row * self.row_bytes)

    def array(self) -> np.ndarray:
        """The rows, read from disk as they are used."""
        return np.load(self.path, mmap_mode="r")

    def close(self) -> None:
        """Close and delete the file."""
        os.close(self.descriptor)
        self.path.unlink(missing_ok=True)
