"""Heads ranked by a finished run of collect, attribute or the study of attention."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tl_headnorm.errors import InputError, first_line, nearest, unknown
from tl_headnorm.interventions.heads import Heads, all_heads, parse_heads
from tl_headnorm.interventions.names import useful_sign

_RANKED = re.compile(r"(top|bottom):([0-9]{1,9})")
_BY_DEFAULT = "head_resid_contrib_norm_mean"
_FILES = ("focus.parquet", "attribution.parquet", "heads.parquet")


def choose_heads(
    text: str, run: str | None, statistic: str, n_layers: int, n_heads: int
) -> tuple[str, Heads]:
    """(name, heads): a list or a file as in `ablate`, all, or top:K and bottom:K of a run.

    A run of attention ranks by the mean weight on its keywords (or `weight_over_uniform`, what it
    has above an even share), an attribution run by usefulness (`statistic` names the method), a
    collect run by a column of its heads.parquet.
    """
    if text == "all":
        return "all heads", all_heads(range(n_layers), n_heads)
    if not is_ranked(text):
        return f"heads {text}", parse_heads(text, n_layers, n_heads)
    return ranked_heads(text, run, statistic, n_layers, n_heads)


def is_ranked(text: str) -> bool:
    """Whether it is `top:K` or `bottom:K`."""
    return _RANKED.fullmatch(text) is not None


def ranked_heads(
    text: str, run: str | Path | None, statistic: str, n_layers: int, n_heads: int,
    files: Sequence[str] = _FILES,
) -> tuple[str, Heads]:  # fmt: skip
    """(name, the K largest or smallest heads) by the first of the files that a run has."""
    match = _RANKED.fullmatch(text)
    assert match is not None
    if run is None:
        raise InputError(f"run: expected a run directory to rank heads by for {text}, found none")
    by, values = _values(Path(run).expanduser(), statistic, files)
    if not 1 <= int(match[2]) <= len(values):
        raise InputError(f"heads: expected a number from 1 to {len(values)}, found {text!r}")
    order = np.argsort(values.to_numpy() * (1 if match[1] == "bottom" else -1), kind="stable")
    pairs = (values.index[i] for i in order[: int(match[2])])
    heads = tuple(sorted((int(layer), int(head)) for layer, head in pairs))
    for layer, head in heads:
        if layer >= n_layers or head >= n_heads:
            raise InputError(
                f"run: expected a run of a model with {n_layers} layers and {n_heads} heads, "
                f"found head {layer}.{head} in {run}"
            )
    return f"{text} by {by}", heads


def _values(run: Path, statistic: str, files: Sequence[str]) -> tuple[str, pd.Series]:
    """(what heads are ranked by, its values by layer and head)."""
    found = next((name for name in files if (run / name).is_file()), files[-1])
    try:
        table = pd.read_parquet(run / found)
    except Exception as error:  # pyarrow raises of every kind on a damaged file
        raise InputError(
            f"run: expected a run directory with {' or '.join(files)}, found {run} "
            f"({first_line(error)}); give --run the directory of a finished run"
        ) from None
    by, values = _OF_FILE[found](table, statistic)
    return by, values.groupby([table["layer"], table["head"]]).mean().dropna()


def _by_focus(table: pd.DataFrame, statistic: str) -> tuple[str, pd.Series]:
    known = ("weight", "weight_over_uniform")
    by = "weight" if statistic == "auto" else statistic
    if by not in known:
        raise unknown("statistic", by, known)
    return by, table["weight"] - (table["uniform_weight"] if by == known[1] else 0)


def _by_attribution(table: pd.DataFrame, statistic: str) -> tuple[str, pd.Series]:
    methods = [str(method) for method in dict.fromkeys(table["method"])]
    by = methods[0] if statistic == "auto" else statistic
    if by not in methods:
        raise unknown("statistic", by, methods)
    return by, useful_sign(by) * table["mean"].where(table["method"] == by)


def _by_column(table: pd.DataFrame, statistic: str) -> tuple[str, pd.Series]:
    by = _BY_DEFAULT if statistic == "auto" else statistic
    columns = [str(c) for c in table.columns if c not in ("layer", "head")]
    if by not in columns:
        raise InputError(
            f"statistic: expected one of {', '.join(columns)}, found {by!r}{nearest(by, columns)}"
        )
    return by, table[by].astype(np.float64)


_OF_FILE = dict(zip(_FILES, (_by_focus, _by_attribution, _by_column), strict=True))


def random_heads(
    like: Heads, n_layers: int, n_heads: int, number: int, seed: int
) -> list[tuple[str, Heads]]:
    """`number` sets of as many heads, drawn from the others (from all where too few are left)."""
    every = all_heads(range(n_layers), n_heads)
    others = [pair for pair in every if pair not in set(like)]
    pool = others if len(others) >= len(like) else every
    rng = np.random.default_rng([seed, len(like)])
    drawn = [rng.choice(len(pool), size=len(like), replace=False) for _ in range(number)]
    return [
        (f"random {i}", tuple(sorted(pool[j] for j in chosen))) for i, chosen in enumerate(drawn, 1)
    ]
