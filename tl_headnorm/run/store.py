"""Per-sample values on disk: rows written where they belong, never all in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_headnorm.errors import InputError


class RowFile:
    """A .npy file [n_rows, ...] written row by row, in any order; float32 unless told.

    Plain writes, not a memory map: pages of a map count as resident memory until they are
    dropped. Rows that were never written are zero and take no room on the disk.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: str = "<f4", *, reopen: bool = False
    ) -> None:
        """Make the file, or with `reopen` go on with it; InputError where it is another."""
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        if not reopen:
            self._make()
        self.start = self._check()
        self.descriptor = os.open(path, os.O_RDWR)

    def _make(self) -> None:
        with self.path.open("wb") as stream:
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + self.shape[0] * self.row_bytes)

    def _check(self) -> int:
        """Where the rows begin."""
        try:
            with self.path.open("rb") as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                start, size = stream.tell(), os.fstat(stream.fileno()).st_size
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: expected rows kept of a run ({error})") from None
        if (shape, dtype, size) != (self.shape, self.dtype, start + shape[0] * self.row_bytes):
            raise InputError(
                f"{self.path}: expected rows {self.shape} of {self.dtype}, found {shape} of "
                f"{dtype} in {size:,} bytes"
            )
        return start

    def __setitem__(self, rows: Sequence[int], values: np.ndarray) -> None:
        for row, value in zip(rows, np.ascontiguousarray(values, self.dtype), strict=True):
            if not 0 <= row < self.shape[0]:
                raise IndexError(f"row {row} of {self.shape[0]}")
            self._write(value.tobytes(), self.start + row * self.row_bytes)

    def _write(self, data: bytes, offset: int) -> None:
        """All of it: a disk about to be full takes a part and says so only by the count."""
        left = memoryview(data)
        while left:
            done = os.pwrite(self.descriptor, left, offset)
            left, offset = left[done:], offset + done

    def array(self) -> np.ndarray:
        """The rows, read from disk as they are used."""
        if 0 in self.shape:  # an empty file cannot be mapped
            return np.zeros(self.shape, self.dtype)
        return np.load(self.path, mmap_mode="r")

    def sync(self) -> None:
        """Have what was written reach the disk."""
        os.fsync(self.descriptor)

    def close(self, *, delete: bool = True) -> None:
        """Close and, unless told otherwise, delete the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        if delete:
            self.path.unlink(missing_ok=True)
