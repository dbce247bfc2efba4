"""Heads ranked by a finished run of collect, attribute or the study of attention."""

from pathlib import Path

import numpy as np
import pandas as pd

from tl_headnorm.errors import InputError, first_line, unknown
from tl_headnorm.interventions.heads import Heads, is_ranked, parse_heads, ranked_heads
from tl_headnorm.interventions.names import useful_sign

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
        return "all heads", tuple((la, h) for la in range(n_layers) for h in range(n_heads))
    if not is_ranked(text):
        return f"heads {text}", parse_heads(text, n_layers, n_heads)
    by, heads = ranked_by_run(text, run, statistic)
    beyond = [f"{la}.{h}" for la, h in heads if la >= n_layers or h >= n_heads]
    if beyond:
        raise InputError(
            f"run: expected a run of a model with {n_layers} layers and {n_heads} heads, found "
            f"head {beyond[0]} in {run}"
        )
    return f"{text} by {by}", heads


def ranked_by_run(text: str, run: str | None, statistic: str) -> tuple[str, Heads]:
    """(what they are ranked by, the K largest or smallest heads of a run directory)."""
    if run is None:
        raise InputError(f"run: expected a run directory to rank heads by for {text}, found none")
    folder = Path(run).expanduser()
    found = [name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise InputError(
            f"run: expected a run directory with {', '.join(_FILES[:-1])} or {_FILES[-1]}, found "
            f"none of them in {run}; give --run the directory of a finished run"
        )
    if found[0] == "heads.parquet":
        by = _BY_DEFAULT if statistic == "auto" else statistic
        return by, ranked_heads(text, run, by)
    table = _read(folder / found[0])
    if found[0] == "focus.parquet":
        by, values = _by_focus(table, statistic)
    else:
        by, values = _by_attribution(table, statistic)
    values = values.dropna()
    kind, _, number = text.partition(":")
    if not 1 <= int(number) <= len(values):
        raise InputError(f"heads: expected a number from 1 to {len(values)}, found {text!r}")
    order = np.argsort(values.to_numpy() * (1 if kind == "bottom" else -1), kind="stable")
    chosen = [values.index[i] for i in order[: int(number)]]
    return by, tuple(sorted((int(layer), int(head)) for layer, head in chosen))


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow raises of every kind on a damaged file
        raise InputError(f"run: could not read {path} ({first_line(error)})") from None


def _by_focus(table: pd.DataFrame, statistic: str) -> tuple[str, pd.Series]:
    known = ("weight", "weight_over_uniform")
    by = "weight" if statistic == "auto" else statistic
    if by not in known:
        raise unknown("statistic", by, known)
    value = table["weight"] - (table["uniform_weight"] if by == known[1] else 0)
    return by, value.groupby([table["layer"], table["head"]]).mean()


def _by_attribution(table: pd.DataFrame, statistic: str) -> tuple[str, pd.Series]:
    methods = list(dict.fromkeys(table["method"]))
    by = str(methods[0]) if statistic == "auto" else statistic
    if by not in methods:
        raise unknown("statistic", by, [str(m) for m in methods])
    rows = table[table["method"] == by]
    return by, useful_sign(by) * rows.groupby(["layer", "head"])["mean"].mean()


def random_heads(
    like: Heads, n_layers: int, n_heads: int, number: int, seed: int
) -> list[tuple[str, Heads]]:
    """`number` sets of as many heads, drawn from the others (from all where too few are left)."""
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    others = [pair for pair in every if pair not in set(like)]
    pool = others if len(others) >= len(like) else every
    rng = np.random.default_rng([seed, len(like)])
    drawn = [rng.choice(len(pool), size=len(like), replace=False) for _ in range(number)]
    return [
        (f"random {i}", tuple(sorted(pool[j] for j in chosen))) for i, chosen in enumerate(drawn, 1)
    ]
