"""Sets of heads and layers: `3.0-4,5.*`, or a file; rankings.py has `top:8` of a run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_headnorm.errors import InputError, first_line

Heads = tuple[tuple[int, int], ...]
_HEADS = re.compile(r"([0-9]{1,9})\.(?:([0-9]{1,9})(?:-([0-9]{1,9}))?|(\*))")
_HELP = "L.H, L.H-H, L.*, a file, all, sweep, none, top:K or bottom:K"


def all_heads(layers: Sequence[int], n_heads: int) -> Heads:
    """Every head of the layers."""
    return tuple((layer, head) for layer in layers for head in range(n_heads))


def parse_layers(text: str, n_layers: int, setting: str = "layers") -> tuple[int, ...]:
    """`all`, `none`, or numbers and ranges such as `0,3-5`, in ascending order."""
    if text in ("all", "none"):
        return tuple(range(n_layers)) if text == "all" else ()
    found: set[int] = set()
    for part in re.split(r"[,\s]+", text.strip()):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if not match:
            raise InputError(
                f"{setting}: expected all, none or layers such as 0,3-5, found {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < n_layers:
            raise InputError(f"{setting}: expected layers from 0 to {n_layers - 1}, found {part!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def parse_heads(text: str, n_layers: int, n_heads: int) -> Heads:
    """A list such as `0.3,1.2-4,5.*`, or a file with `layer: [heads]`, in ascending order."""
    path = Path(text).expanduser()
    if path.suffix in (".json", ".yaml", ".yml"):
        return _checked(_of_file(path), n_layers, n_heads)
    found: set[tuple[int, int]] = set()
    for part in re.split(r"[,\s]+", text.strip()):
        match = _HEADS.fullmatch(part)
        if not match:
            raise InputError(f"heads: expected {_HELP}, found {part!r}")
        layer, last = int(match[1]), n_heads - 1
        heads = range(n_heads) if match[4] else range(int(match[2]), int(match[3] or match[2]) + 1)
        if len(heads) == 0:
            raise InputError(f"heads: expected a range in ascending order, found {part!r}")
        if heads[-1] > last:
            raise InputError(f"heads: expected heads from 0 to {last}, found {part!r}")
        found.update((layer, head) for head in heads)
    return _checked(found, n_layers, n_heads)


def _of_file(path: Path) -> set[tuple[int, int]]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_once(yaml.compose(text, Loader=yaml.SafeLoader), path)
        data: Any = yaml.safe_load(text)  # JSON is YAML
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"heads: expected a file with 'layer: [heads]', found {path} ({first_line(error)})"
        ) from None
    try:
        pairs = [(layer, head) for layer, heads in data.items() for head in _list(heads)]
        return {(_number(layer), _number(head)) for layer, head in pairs}
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"heads: expected 'layer: [heads]' in {path}, such as {{\"3\": [0, 2]}}, found "
            f"{json.dumps(data, default=str)[:60]}"
        ) from None


def _check_once(root: Any, path: Path) -> None:
    """YAML lets a repeated key silently win: half of a layer's heads would be lost."""
    import yaml

    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    keys = [str(key.value) for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise InputError(f"heads: expected each layer once in {path}, found {twice} again")


def _number(value: Any) -> int:
    """A whole number; int() alone would take true for 1 and 2.7 for 2."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(value)
    return int(value)


def _list(value: Any) -> list[Any]:
    """A list; "12" is none of heads 1 and 2."""
    if not isinstance(value, list):
        raise TypeError(value)
    return value


def _checked(heads: set[tuple[int, int]], n_layers: int, n_heads: int) -> Heads:
    if not heads:
        raise InputError(f"heads: expected at least one head, found none; give {_HELP}")
    for layer, head in sorted(heads):
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise InputError(
                f"heads: expected layers from 0 to {n_layers - 1} and heads from 0 to "
                f"{n_heads - 1}, found {layer}.{head}"
            )
    return tuple(sorted(heads))


def as_file(heads: Heads) -> dict[str, list[int]]:
    """`layer: [heads]`, what parse_heads reads."""
    found: dict[str, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(str(layer), []).append(head)
    return found


def label(heads: Heads) -> str:
    """A short name of a set."""
    names = [f"{layer}.{head}" for layer, head in heads]
    return "heads " + ",".join(names) if len(names) <= 6 else f"{len(names)} heads"
