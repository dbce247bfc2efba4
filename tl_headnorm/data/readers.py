"""Records of a dataset split: JSONL, parquet, Arrow, the cache, or the hub."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tl_headnorm.errors import InputError, first_line

# Names under which published copies of ARC keep a split.
SPLIT_NAMES = {
    "test": ("test", "Test"),
    "validation": ("validation", "dev", "val", "Dev", "Validation"),
    "train": ("train", "Train"),
}
_ALIASES = {"dev": "validation", "val": "validation", "valid": "validation"}
Record = tuple[str, object]


@dataclass
class Source:
    """Records as (where, record) and what they were read from.

    A record that could not be read is an exception in its place, so that the caller decides.
    """

    records: Iterable[Record]
    path: str
    files: tuple[Path, ...] = ()

    def sha256(self) -> str | None:
        """Digest of the files' bytes in order; None where there are no files (the hub)."""
        if not self.files:
            return None
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


def canonical_split(split: str) -> str:
    """test, validation or train, from any of the usual names."""
    name = _ALIASES.get(split.lower(), split.lower())
    if name not in SPLIT_NAMES:
        raise InputError(f"split: expected test, validation (dev) or train, found {split!r}")
    return name


def open_split(data_dir: str | None, split: str, hub: tuple[str, str] | None) -> Source:
    """The records of a split in `data_dir` (file or directory), else of the cache or hub."""
    name = canonical_split(split)
    if data_dir is None:
        if hub is None:
            raise InputError("data_dir: expected a file or directory for this dataset, found none")
        return _from_hub(hub, name)
    root = Path(data_dir).expanduser()
    if root.is_file():
        return Source(records_of_file(root), str(root), (root,))
    if not root.is_dir():
        raise InputError(
            f"data_dir: expected an existing file or directory, found nothing at {data_dir}; "
            "check the path, or leave data_dir out to use the cache or the hub"
        )
    return _from_directory(root, name, hub)


def _from_directory(root: Path, split: str, hub: tuple[str, str] | None) -> Source:
    files = find_split_files(root, split, hub[1] if hub else None)
    if files:
        records = (record for file in files for record in records_of_file(file))
        return Source(records, str(files[0] if len(files) == 1 else files[0].parent), files)
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        return _from_saved(root, split)
    present = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise InputError(
        f"data_dir: expected the {split} split in {root} as test.jsonl, ARC-Challenge-Test.jsonl, "
        f"parquet, Arrow or a saved dataset (here for {split}); found {present}"
    )


def find_split_files(root: Path, split: str, config: str | None) -> tuple[Path, ...]:
    """Files of a split below `root`: by plain name first, then as the hub's cache lays them."""
    prefix = config or "*"
    for name in SPLIT_NAMES[split]:
        patterns = [f"{name}.jsonl", f"{prefix}-{name}.jsonl", f"{name}.parquet"]
        patterns += [f"{prefix}-{name}.parquet", f"{name}-*-of-*.parquet"]
        if config:  # a snapshot of the hub, and the Arrow cache made from it
            patterns += [f"**/{config}/{name}-*-of-*.parquet", f"**/{config}/**/*-{name}.arrow"]
            patterns += [f"**/{config}/**/*-{name}-*-of-*.arrow", f"{config}/{name}.jsonl"]
            patterns += [f"{config}/{config}-{name}.jsonl"]
        patterns += [f"*-{name}.arrow", f"*-{name}-*-of-*.arrow"]
        for pattern in patterns:
            # Sorted: shards in order, and of several snapshots always the same one.
            found = sorted(path for path in root.glob(pattern) if path.is_file())
            shards = tuple(path for path in found if path.parent == found[0].parent)
            if len(shards) > 1 and "-of-" not in pattern:
                raise InputError(
                    f"data_dir: expected one file of the {split} split in {root}, found "
                    f"{', '.join(path.name for path in shards)}; set --data_dir to one of them"
                )
            if shards:
                return shards
    return ()


def records_of_file(path: Path) -> Iterator[Record]:
    """Records of one file by its ending; `where` names file and line (or row)."""
    readers = {".parquet": _table, ".arrow": _table, ".jsonl": _jsonl, ".json": _jsonl}
    if path.suffix not in readers:
        raise InputError(f"{path}: expected a .jsonl, .parquet or .arrow file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: expected questions, found an empty file")
    return readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is no fault
            if raw.strip():
                yield f"{path}, line {number}", _parse_line(raw)


def _parse_line(raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        hint = "; save the file as UTF-8" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return ValueError(f"expected UTF-8 text, found byte 0x{raw[error.start]:02x}{hint}")
    # A ValueError that is no JSONDecodeError: a number of more than 4,300 digits.
    except (ValueError, RecursionError) as error:
        return ValueError(f"expected one JSON object, found a broken line ({first_line(error)})")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of a repeated key Python's reader would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def _table(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = "a parquet file" if path.suffix == ".parquet" else "an Arrow stream"
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            with pa.memory_map(str(path)) as stream:
                table = pa.ipc.open_stream(stream).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected {kind} ({first_line(error)})") from None
    batches = table.to_batches(max_chunksize=1024)
    return _numbered((row for batch in batches for row in batch.to_pylist()), str(path))


def _numbered(rows: Iterable[object], name: str) -> Iterator[Record]:
    return ((f"{name}, row {i}", row) for i, row in enumerate(rows, start=1))


def _from_saved(root: Path, split: str) -> Source:
    """A directory written by `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(root))
    except Exception as error:
        raise InputError(f"{root}: expected a saved dataset ({first_line(error)})") from None
    folder = root
    if isinstance(data, DatasetDict):
        name = next((n for n in SPLIT_NAMES[split] if n in data), None)
        if name is None:
            raise InputError(f"{root}: expected the split {split}, found {', '.join(data)}")
        data, folder = data[name], root / name
    elif data.split is not None and str(data.split) not in SPLIT_NAMES[split]:
        raise InputError(f"{root}: expected the split {split}, found {data.split}")
    files = tuple(sorted(folder.glob("*.arrow")))
    return Source(_numbered(data, str(folder)), str(folder), files)


def _from_hub(hub: tuple[str, str], split: str) -> Source:
    """The cache of `datasets`, else the hub (HF_HUB_OFFLINE=1 keeps to the cache)."""
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity_error
    from huggingface_hub.utils.logging import set_verbosity_error as hub_set_verbosity_error

    # Their retries fill the screen where there is no network; the error below says it once.
    set_verbosity_error()
    hub_set_verbosity_error()
    repository, config = hub
    try:
        data = load_dataset(repository, config, split=split)
    except Exception as error:  # the libraries below raise of every kind here
        raise InputError(
            f"dataset {repository} ({config}, {split}): expected it in the cache or on the hub, "
            f"found neither ({first_line(error)}); give --data_dir a copy on disk"
        ) from None
    name = f"{repository}/{config}"
    return Source(_numbered(data, name), name, tuple(Path(f["filename"]) for f in data.cache_files))
