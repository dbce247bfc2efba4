"""The header of a GGUF file, read with bounds: metadata, and where each tensor lies.

Layout (GGUF 2 and 3, little-endian): magic, version u32, number of tensors u64, number of keys
u64; then the keys (name, type u32, value), the tensors (name, number of dimensions u32,
dimensions u64 with the fastest first, type u32, offset u64), and the data, aligned. Nothing the
file says of itself is believed: a count that the rest of the file cannot hold is refused before
anything of that size is made, so a header takes memory in proportion to the file.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from tl_headnorm.errors import InputError, first_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# struct formats of the scalar types: u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
LONGEST_NAME, LONGEST_TEXT, LONGEST_ARRAY = 1 << 16, 1 << 24, 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's offset in the file and its shape in torch's order (fastest axis last)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Metadata by key, and the tensors by name, all of which lie inside the file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])


def is_gguf(source: str) -> bool:
    """Whether a model's source means a GGUF file: by its ending, or by its first four bytes."""
    if source.lower().endswith(".gguf"):
        return True
    try:
        with Path(source).expanduser().open("rb") as file:
            return file.read(4) == MAGIC
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> Header:
    """Read and check a file's header. Raises InputError with one line on whatever is wrong."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                refuse(path, "the four bytes GGUF at its beginning", "others")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model_path: expected a GGUF file that can be read, found {first_line(error)}; check "
            "the path"
        ) from None


def refuse(path: Path, expected: str, found: object, advice: str = "") -> NoReturn:
    """Raise InputError about a GGUF file."""
    raise InputError(
        f"model_path: expected {expected} in {path.name}, found {found}; "
        + (advice or "the file is damaged or no GGUF file: get it anew")
    )


def block_sizes() -> dict[int, tuple[str, int, int]]:
    """Type number -> (name, values per block, bytes per block), of what `gguf` dequantises."""
    import numpy as np

    try:
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize
    except ImportError:
        raise InputError(
            "model_path: expected the package gguf to be installed for a GGUF file, found none; "
            "pip install 'tl-headnorm[gguf]'"
        ) from None
    known = {}
    for kind, (values, size) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        known[int(kind)] = (kind.name, values, size)
    return known


class _Reader:
    """A cursor over the file's bytes that refuses to pass its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def header(self) -> Header:
        (version,) = self.take("I")
        if version not in VERSIONS:
            refuse(
                self.path, "GGUF of version 2 or 3", f"version {version}",
                "write it anew with today's llama.cpp, little-endian",
            )  # fmt: skip
        n_tensors, n_fields = self.take("QQ")
        self.check_count(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        self.check_count(n_fields, 8 + 4 + 1, "keys")
        fields = self.named(n_fields, self.value, "keys")
        if not isinstance(fields.get("general.architecture"), str):
            refuse(self.path, "the key general.architecture", "none")
        sizes = block_sizes()
        tensors = self.named(n_tensors, lambda name: self.tensor(name, sizes), "tensors")
        return Header(self.path, fields, self.placed(tensors, fields.get("general.alignment", 32)))

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        if size > len(self.data) - self.at:
            refuse(
                self.path, f"{size} more bytes at byte {self.at}",
                f"an end at {len(self.data)} (a truncated file)", "get it anew",
            )  # fmt: skip
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += size
        return found

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count of things that need `least` bytes each, where the file cannot hold it."""
        room = (len(self.data) - self.at) // least
        if count > min(room, LONGEST_ARRAY):
            refuse(self.path, f"at most {min(room, LONGEST_ARRAY)} {what}", f"a count of {count}")

    def text(self, longest: int = LONGEST_TEXT) -> str:
        (length,) = self.take("Q")
        if length > longest:
            refuse(self.path, f"a text of at most {longest} bytes", f"a length of {length}")
        (raw,) = self.take(f"{length}s")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            refuse(self.path, f"UTF-8 before byte {self.at}", "other bytes")

    def value(self, name: str) -> Any:
        (kind,) = self.take("I")
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind != ARRAY:
            refuse(self.path, f"a known type of value for {name[:80]}", f"type {kind}")
        kind, count = self.take("IQ")
        if kind == STRING:
            self.check_count(count, 8, f"texts in {name[:80]}")
            return [self.text(LONGEST_NAME) for _ in range(count)]
        if kind not in SCALARS:
            refuse(self.path, f"texts or numbers in the list {name[:80]}", f"type {kind}")
        self.check_count(count, struct.calcsize(SCALARS[kind]), f"values in {name[:80]}")
        return list(self.take(f"{count}{SCALARS[kind]}"))

    def named(self, count: int, read: Callable[[str], Any], what: str) -> dict[str, Any]:
        """`count` names, each with what follows it; a name that comes twice is refused."""
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(LONGEST_NAME)
            if name in found:
                refuse(self.path, f"{what} with names of their own", f"{name[:80]!r} twice")
            found[name] = read(name)
        return found

    def tensor(self, name: str, sizes: dict[int, tuple[str, int, int]]) -> TensorInfo:
        """A tensor's entry; its offset still counts from the beginning of the data."""
        (n_dims,) = self.take("I")
        if not 1 <= n_dims <= 4:
            refuse(self.path, f"1 to 4 dimensions of {name[:80]}", n_dims)
        dims = self.take(f"{n_dims}Q")
        kind, offset = self.take("IQ")
        if kind not in sizes:
            refuse(
                self.path, f"a type of tensor that the package gguf dequantises for {name[:80]}",
                f"type {kind}", "take a file of another quantisation, or a newer gguf",
            )  # fmt: skip
        type_name, values, size = sizes[kind]
        if min(dims) < 1 or dims[0] % values:
            refuse(self.path, f"rows of full blocks of {values} in {name[:80]}", f"sizes {dims}")
        n_bytes = prod(dims) // values * size
        return TensorInfo(name, tuple(reversed(dims)), type_name, offset, n_bytes)

    def placed(self, tensors: dict[str, TensorInfo], alignment: Any) -> dict[str, TensorInfo]:
        """The tensors with offsets in the file, each inside it and after the one before."""
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
            refuse(self.path, "an alignment from 1 to 65536", alignment)
        start = free = -(-self.at // alignment) * alignment
        found = {}
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            at = start + tensor.offset
            if at < free:
                refuse(self.path, f"{tensor.name[:80]} in a place of its own", "an overlap")
            free = at + tensor.n_bytes
            if free > len(self.data):
                refuse(
                    self.path, f"{tensor.name[:80]} up to byte {free}",
                    f"an end at {len(self.data)} (a truncated file)", "get it anew",
                )  # fmt: skip
            found[tensor.name] = TensorInfo(
                tensor.name, tensor.shape, tensor.type_name, at, tensor.n_bytes
            )
        return found
