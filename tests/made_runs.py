"""Runs made up for the tests of the report: any shape, any fault, values that are known."""

import numpy as np
import xarray as xr

from tl_headnorm.data.questions import Question

WORDS = {
    "head_output_norm": ("‖z_h‖", "activation units (L2)"),
    "head_resid_contrib_norm": ("‖z_h W_O‖", "residual units (L2)"),
}


def made_run(n_layers=3, n_heads=5, n=40, *, seed=0, right=None, per_sample=True, words=None,
             missing=(), ids=None, **attrs):  # fmt: skip
    """A run as `load_run` gives it. `right`: which samples are correct; False scores nothing."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 0.5, (n_layers, n_heads)))
    run = xr.Dataset(coords={"layer": np.arange(n_layers), "head": np.arange(n_heads)})
    for k, (name, (formula, unit)) in enumerate((words or WORDS).items()):
        values = (scale * (k + 1) * np.exp(rng.normal(0, 0.2, (n, n_layers, n_heads)))).astype("f4")
        values[:, list(missing)] = np.nan
        said = {"formula": formula, "units": unit, "measure": name}
        wide = values.astype(np.float64)
        mean = wide.mean(0)
        std = wide.std(0, ddof=1) if n > 1 else np.full(mean.shape, np.nan)
        for part, array in (("mean", mean), ("std", std), ("M2", (n - 1) * std**2),
                            ("n", np.full(mean.shape, n))):  # fmt: skip
            run[f"{name}_{part}"] = (("layer", "head"), array, said)
        if per_sample:
            run[name] = (("sample", "layer", "head"), values, said)
    right = rng.random(n) < 0.6 if right is None else right
    scored = right is not False
    answers = np.array(["ABCD"[i % 4] for i in range(n)], dtype=object)
    given = ["ABCD"[(i + (not right[i])) % 4] for i in range(n)] if scored else [None] * n
    columns = {
        "sample": np.arange(n),
        "sample_id": np.array(ids or [f"q{i}" for i in range(n)], dtype=object),
        "n_tokens": rng.integers(20, 90, n),
        "answer_letter": answers,
        "predicted": np.array(given, dtype=object),
        "correct": np.array([bool(x) for x in right] if scored else given, dtype=object),
    }
    run = run.assign_coords({name: ("sample", column) for name, column in columns.items()})
    run.attrs = {
        "num_processed": n, "num_skipped": {}, "num_truncated": 0, "num_tokens": 50 * n,
        "dataset": {"name": "made", "split": "test", "path": None, "sha256": "00"},
        "template": {"name": "arc_mcq_v1", "sha256": "11", "common_prefix_length": 5},
        "model": {"source": "somewhere/model", "revision": None, "n_layers": n_layers,
                  "n_heads": n_heads, "d_head": 8, "dtype": "fp32", "adapter": None},
        "token_agg": "last", "exclude_first_token": False, "missing_layers": list(missing),
        "accuracy": float(np.mean(right)) if scored else None, "validated_against_hf": 1e-6,
        "versions": {"tl_headnorm": "0"}, "seed": 3, "settings": {"n_options": [4, 5]},
        "finished_at": "2026-01-02T03:04:05+00:00", **attrs,
    }  # fmt: skip
    return run


def question(identity, stem, options=("yes", "no", "maybe", "never")):
    return Question(identity, stem, tuple(options), tuple("ABCDEFGH"[: len(options)]), 0)


def asked(n, text="What about number {i}?"):
    """Questions in the order of the samples."""
    return [question(f"q{i}", text.format(i=i)) for i in range(n)]
