"""Differences between two runs, per measure and head, with tests and cautions."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from scipy.special import bdtr, stdtr
from scipy.stats import false_discovery_control

from tl_headnorm.errors import InputError
from tl_headnorm.run.results import measures_of
from tl_headnorm.stats import Moments

# Relative step between neighbouring numbers of a data type.
STEP = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-23, "fp64": 2.0**-52}
# What says how long a run took, not what it measured.
_INCIDENTAL = {
    "wall_seconds", "tokens_per_second", "peak_memory_bytes", "started_at", "finished_at",
    "settings.output_dir", "settings.experiment_name", "settings.debug",
    "settings.validate_samples", "validated_against_hf",
}  # fmt: skip

Grid = Float[np.ndarray, "layer head"]


def compare(
    run_a: xr.Dataset, run_b: xr.Dataset, *, names: tuple[str, str] = ("A", "B")
) -> xr.Dataset:
    """Change from run A to run B, per measure and head.

    Where both runs hold values per sample and share samples (same id, same right answer), only
    those count and every sample is its own control: with d_i = b_i - a_i over the n pairs,

        t = mean(d) / (std(d) / sqrt(n)),  df = n - 1;  effect = mean(d) / std(d)  (Cohen's d_z)

    Else Welch's test from the moments of all samples, with Cohen's d over the pooled standard
    deviation. p is two-sided, q adjusted over the heads of a measure (Benjamini, Hochberg 1995).

    Returns a Dataset with dims (measure, layer, head): `mean_a`, `mean_b`, `difference` (B - A,
    the measure's units), `log2_ratio` (of B to A; NaN unless both means are above 0), `t`, `p`,
    `q`, `effect` (no unit), `rank_a`, `rank_b` (1 is the largest; ties share their mean rank)
    and `n` (pairs, or samples of both together). `attrs` holds `paired`, `accuracy`, per
    measure the Spearman correlation of the ranks, what the records differ in, and `cautions`,
    each also given as a warning. Raises InputError where the runs have different shapes or no
    measure in common.

    What the numbers cannot tell: why a head changed (one changed head changes all layers
    above it), and, with many samples, whether a change is large enough to matter: a difference
    of rounding can have a tiny p. Read `effect` and `log2_ratio` first.

    Source: Welch 1947; Cohen 1988; Lakens, "Calculating and reporting effect sizes", 2013.
    """
    shared = _check(run_a, run_b)
    pairs, why = common_samples(run_a, run_b, shared)
    tables = [_of_measure(name, run_a, run_b, pairs) for name in shared]
    out = xr.Dataset(
        {
            column: (("measure", "layer", "head"), np.stack([table[column] for table in tables]))
            for column in tables[0]
        },
        coords={"measure": shared, "layer": run_a["layer"].values, "head": run_a["head"].values},
    )
    cautions = find_cautions(run_a, run_b, pairs, names)
    dtypes = [run.attrs["model"]["dtype"] for run in (run_a, run_b)]
    step = max(STEP.get(dtype, 0.0) for dtype in dtypes)
    out.attrs = {
        "names": list(names),
        "paired": pairs is not None,
        "why_unpaired": why,
        "effect_is": "d_z, paired" if pairs is not None else "d, pooled standard deviation",
        "n_a": run_a.sizes["sample"],
        "n_b": run_b.sizes["sample"],
        "n_common": None if pairs is None else len(pairs[0]),
        "accuracy": _accuracy(run_a, run_b, pairs),
        "measures": {name: _in_words(out, name, run_a, step) for name in shared},
        "left_out": sorted(set(measures_of(run_a)) ^ set(measures_of(run_b))),
        "differing": differing(run_a.attrs, run_b.attrs),
        "cautions": cautions,
        "dtypes": dtypes,
    }
    for caution in cautions:
        warnings.warn(caution, stacklevel=2)
    return out


def _check(run_a: xr.Dataset, run_b: xr.Dataset) -> list[str]:
    """The measures both hold; raises InputError where the runs do not compare."""
    shapes = [(run.sizes["layer"], run.sizes["head"]) for run in (run_a, run_b)]
    if shapes[0] != shapes[1]:
        (la, ha), (lb, hb) = shapes
        raise InputError(
            f"compare: expected two runs of the same shape, found {la} layers x {ha} heads and "
            f"{lb} layers x {hb} heads; heads of different shapes have no counterparts"
        )
    shared = [name for name in measures_of(run_a) if name in measures_of(run_b)]
    if not shared:
        raise InputError(
            f"compare: expected a measure in both runs, found {measures_of(run_a)} and "
            f"{measures_of(run_b)}; run collect again with the same measures"
        )
    return shared


def common_samples(
    run_a: xr.Dataset, run_b: xr.Dataset, shared: Sequence[str]
) -> tuple[tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]] | None, str | None]:
    """((positions in A, positions in B) of the same samples, None), or (None, why not).

    Sorted by id, so that the order of neither run matters. Ids alone may agree by chance
    ("1", "2", ...), so the right answers must agree too.
    """
    if not all(name in run for run in (run_a, run_b) for name in shared):
        return None, "not both runs hold values per sample"
    ids = [run["sample_id"].values.astype(str) for run in (run_a, run_b)]
    if any(len(np.unique(each)) < len(each) for each in ids):
        return None, "sample ids are not unique"
    _, at_a, at_b = np.intersect1d(ids[0], ids[1], return_indices=True)
    if len(at_a) < 2:
        return None, f"{len(at_a)} sample ids in common"
    answers = [
        run["answer_letter"].values[at].astype(str)
        for run, at in ((run_a, at_a), (run_b, at_b))
    ]  # fmt: skip
    if (answers[0] != answers[1]).any():
        return None, "the same ids stand for questions with different answers"
    return (at_a, at_b), None


def _of_measure(
    name: str, run_a: xr.Dataset, run_b: xr.Dataset, pairs: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Grid]:
    """Every column of one measure."""
    if pairs is not None:
        a, b = (
            run[name].values[at].astype(np.float64)
            for run, at in zip((run_a, run_b), pairs, strict=True)
        )
        found = paired(a, b)
    else:
        found = unpaired(*(_moments(name, run) for run in (run_a, run_b)))
    a, b = found["mean_a"], found["mean_b"]
    both = (a > 0) & (b > 0)
    ratio = np.divide(b, a, out=np.full(a.shape, np.nan), where=both)
    q = np.full(a.shape, np.nan)
    tested = ~np.isnan(found["p"])
    q[tested] = false_discovery_control(found["p"][tested])
    return {
        **found,
        "difference": b - a,
        "log2_ratio": np.log2(ratio),
        "q": q,
        "rank_a": ranked(a),
        "rank_b": ranked(b),
    }


def _moments(name: str, run: xr.Dataset) -> Moments:
    return Moments(*(run[f"{name}_{part}"].values for part in ("n", "mean", "M2")))


def paired(
    a: Float[np.ndarray, "pair layer head"], b: Float[np.ndarray, "pair layer head"]
) -> dict[str, Grid]:
    """Student's t of the differences b - a; pairs with NaN on either side do not count.

    t is +-inf where every difference is the same and not 0, and 0 where all of them are 0.
    """
    seen = ~(np.isnan(a) | np.isnan(b))
    a, b = np.where(seen, a, np.nan), np.where(seen, b, np.nan)
    change = Moments.of(b - a)
    n, mean, std = change.n, change.mean_or_nan(), change.std()
    t = _over(mean, std / np.sqrt(np.maximum(n, 1)))
    return {
        "mean_a": Moments.of(a).mean_or_nan(),
        "mean_b": Moments.of(b).mean_or_nan(),
        "t": t,
        "p": two_sided(t, n - 1),
        "effect": _over(mean, std),
        "n": n.astype(float),
    }


def unpaired(a: Moments, b: Moments) -> dict[str, Grid]:
    """Welch's t from the moments of two sets of samples; effect over the pooled variance."""
    mean_a, mean_b = a.mean_or_nan(), b.mean_or_nan()
    error_a, error_b = (m.std() ** 2 / np.maximum(m.n, 1) for m in (a, b))
    t = _over(mean_b - mean_a, np.sqrt(error_a + error_b))
    least = [np.maximum(m.n - 1, 1) for m in (a, b)]
    below = error_a**2 / least[0] + error_b**2 / least[1]
    df = np.divide(
        (error_a + error_b) ** 2, below, out=np.asarray(a.n + b.n - 2, float), where=below > 0
    )
    pooled = np.sqrt((a.M2 + b.M2) / np.maximum(a.n + b.n - 2, 1))
    return {
        "mean_a": mean_a,
        "mean_b": mean_b,
        "t": t,
        "p": two_sided(t, df),
        "effect": np.where(np.isnan(t), np.nan, _over(mean_b - mean_a, pooled)),
        "n": (a.n + b.n).astype(float),
    }  # fmt: skip


def _over(value: Grid, spread: Grid) -> Grid:
    """value / spread; 0 where value is 0, +-inf where only the spread is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out = value / spread
    return np.where((value == 0) & (spread == 0), 0.0, out)


def two_sided(t: Grid, df: Grid | Int[np.ndarray, "layer head"]) -> Grid:
    """Chance of a |t| this large or larger under Student's distribution; NaN where t is NaN."""
    tail = stdtr(np.maximum(np.asarray(df, float), 1.0), -np.abs(t))
    return np.where(np.isnan(t), np.nan, np.minimum(2 * tail, 1.0))


def ranked(values: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """1 for the largest; ties share their mean rank; NaN stays NaN."""
    flat = pd.Series(values.ravel()).rank(ascending=False)
    return flat.to_numpy().reshape(values.shape)


def spearman(rank_a: Grid, rank_b: Grid) -> float | None:
    """Pearson's correlation of the ranks; None where it is not defined."""
    real = ~(np.isnan(rank_a) | np.isnan(rank_b))
    a, b = ranked(rank_a[real]), ranked(rank_b[real])
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _in_words(out: xr.Dataset, name: str, run: xr.Dataset, step: float) -> dict[str, Any]:
    """One measure's entry on the page: formula, unit, Spearman correlation, rounding step."""
    one, text = out.sel(measure=name), run[f"{name}_mean"].attrs
    return {
        "formula": text.get("formula", name),
        "units": text.get("units", ""),
        "spearman": spearman(one["rank_a"].values, one["rank_b"].values),
        "heads": int((~np.isnan(one["difference"].values)).sum()),
        "step": step,
    }


def _accuracy(
    run_a: xr.Dataset, run_b: xr.Dataset, pairs: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Any] | None:
    """Letter accuracy of both; on common samples also who changed, and McNemar's exact p.

    Of the samples right in one run alone, each side has half if nothing changed: p is the
    two-sided binomial tail. None where a run was not scored.
    """
    right = [run["correct"].values for run in (run_a, run_b)]
    if any(len(each) == 0 or any(value is None for value in each) for each in right):
        return None
    a, b = (each.astype(bool) for each in right)
    if pairs is not None:
        a, b = a[pairs[0]], b[pairs[1]]
    out = {"a": float(a.mean()), "b": float(b.mean()), "difference": float(b.mean() - a.mean())}
    if pairs is None:
        return out
    lost, gained = int((a & ~b).sum()), int((~a & b).sum())
    p = min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))
    return {**out, "lost": lost, "gained": gained, "p": p}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of two runs' records that are not the same, by dotted key."""
    flat_a, flat_b = _flat(a), _flat(b)
    keys = [key for key in {**flat_a, **flat_b} if key not in _INCIDENTAL]
    return [
        {"key": key, "a": flat_a.get(key), "b": flat_b.get(key)}
        for key in keys
        if flat_a.get(key) != flat_b.get(key)
    ]


def _flat(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{before}{key}.")
        else:
            out[f"{before}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def find_cautions(
    run_a: xr.Dataset,
    run_b: xr.Dataset,
    pairs: tuple[np.ndarray, np.ndarray] | None,
    names: tuple[str, str] = ("A", "B"),
) -> list[str]:
    """Differences between the runs other than the heads, a line each."""
    a, b = _flat(run_a.attrs), _flat(run_b.attrs)

    def both(*keys: str) -> str | None:
        """The first of the keys that differs, with both values; None where none does."""
        for key in keys:
            if a.get(key) != b.get(key):
                left, right = (_short(each.get(key)) for each in (a, b))
                return f"{names[0]} has {key} {left}, {names[1]} {right}"
        return None

    found = []
    if text := both("token_agg", "exclude_first_token"):
        found.append(f"aggregation differs: {text}; the runs measure different quantities")
    if text := both("dataset.name", "dataset.split", "dataset.sha256"):
        compared = "only common samples count" if pairs is not None else "all samples count"
        found.append(f"dataset differs: {text}; {compared}")
    prompt = both(
        "template.sha256", "template.name", "template.chat_sha256", "template.examples_sha256",
        "settings.few_shot",
    )  # fmt: skip
    if prompt:
        found.append(f"template differs: {prompt}; part of the change is the prompt's")
    if text := _tokens_differ(run_a, run_b, pairs, both, bool(prompt)):
        found.append(f"tokenisation differs: {text}; positions do not correspond")
    if text := both("model.dtype"):
        step = max(STEP.get(str(each.get("model.dtype")), 0.0) for each in (a, b))
        found.append(
            f"dtype differs: {text}; changes of a few times {step:.1g} of a value may be rounding"
        )
    return found


def _tokens_differ(
    run_a: xr.Dataset, run_b: xr.Dataset, pairs: Any, both: Any, other_prompt: bool
) -> str | None:
    """A difference in tokens that another prompt does not explain."""
    answers = [
        (key, run_a.attrs["answer_tokens"][key], run_b.attrs["answer_tokens"][key])
        for key in run_a.attrs.get("answer_tokens", {})
        if key in run_b.attrs.get("answer_tokens", {})
    ]
    for letter, left, right in answers:
        if left != right:
            return f"the answer {letter} is token {left['token']!r} and {right['token']!r}"
    if text := both("prepend_bos"):
        return str(text)
    if pairs is None or other_prompt:
        return None
    lengths = [run["n_tokens"].values[at] for run, at in zip((run_a, run_b), pairs, strict=True)]
    count = int((lengths[0] != lengths[1]).sum())
    return f"{count} of {len(lengths[0])} common samples differ in length" if count else None


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def table(result: xr.Dataset) -> pd.DataFrame:
    """compare.parquet: one row per measure and head."""
    columns = ["mean_a", "mean_b", "difference", "log2_ratio", "t", "p", "q", "effect",
               "rank_a", "rank_b", "n"]  # fmt: skip
    frame = result[columns].to_dataframe().reset_index()
    frame["n"] = frame["n"].astype(int)
    return frame[["layer", "head", "measure", *columns]]


def movers(result: xr.Dataset, name: str, most: int, fdr: float) -> pd.DataFrame:
    """The heads that changed most, of those told apart from no change (q <= fdr).

    By |log2 ratio|; by |difference| where a measure has values of both signs.
    """
    rows = table(result.sel(measure=[name]))
    by = "log2_ratio" if rows["log2_ratio"].notna().any() else "difference"
    rows = rows[(rows["q"] <= fdr) & (rows["difference"] != 0)]
    size = rows[by].abs().fillna(0.0)
    return rows.loc[size.sort_values(ascending=False, kind="stable").index].head(most)
