"""Two runs side by side: the tests of the statistics, which samples pair, and the files."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as scipy_stats

from tl_headnorm import collect, load_model, load_questions
from tl_headnorm.commands.compare import plots
from tl_headnorm.commands.compare.compare import (
    common_samples,
    compare,
    movers,
    ranked,
    spearman,
    table,
)
from tl_headnorm.commands.compare.settings import CompareSettings
from tl_headnorm.errors import InputError
from tl_headnorm.plots import plotly
from tl_headnorm.plots.png import png
from tl_headnorm.run.reading import load_run
from tl_headnorm.run.results import measures_of
from tl_headnorm.stats import Moments

SHAPE = (3, 5)
NORM, SIGNED = "head_output_norm", "signed"
RECORD = {
    "model": {"source": "m", "dtype": "fp32"},
    "dataset": {"name": "d", "split": "test", "path": "p", "sha256": "1"},
    "template": {"name": "t", "sha256": "2"},
    "token_agg": "last",
    "exclude_first_token": False,
    "prepend_bos": True,
    "answer_tokens": {"A": {"token": "A", "id": 5}},
    "settings": {"few_shot": 0},
}


def a_run(
    values, *, ids=None, answers=None, correct=None, per_sample=True, n_tokens=None, **record
):
    """A run's Dataset from per-sample values by measure, without a model."""
    n = len(next(iter(values.values())))
    run = xr.Dataset(attrs={**RECORD, **record})
    for name, value in values.items():
        moment = Moments.of(value)
        parts = {"mean": moment.mean_or_nan(), "std": moment.std(), "n": moment.n, "M2": moment.M2}
        for part, array in parts.items():
            text = {"formula": f"‖{name}‖", "units": "units"}
            run[f"{name}_{part}"] = (("layer", "head"), array, text)
        if per_sample:
            run[name] = (("sample", "layer", "head"), value)
    columns = {
        "sample_id": [f"q{i}" for i in range(n)] if ids is None else list(ids),
        "answer_letter": ["ABCD"[i % 4] for i in range(n)] if answers is None else list(answers),
        "n_tokens": [100 + i for i in range(n)] if n_tokens is None else list(n_tokens),
        "correct": [None] * n if correct is None else list(correct),
    }
    for name, column in columns.items():
        run.coords[name] = ("sample", np.array(column, dtype=object))
    return run.assign_coords(
        sample=np.arange(n), layer=np.arange(SHAPE[0]), head=np.arange(SHAPE[1])
    )


def norms(seed=0, n=40, shape=SHAPE):
    """Positive values whose samples differ a lot and whose heads share what differs."""
    generator = np.random.default_rng(seed)
    common = np.exp(generator.normal(size=(n, 1, 1)))
    return 3 * common * np.exp(0.05 * generator.normal(size=(n, *shape)))


def reordered(run, order):
    return run.isel(sample=order)


# Against scipy, and in closed form.


def test_pairs_against_scipy():
    a, b = norms(0), norms(1)
    found = compare(a_run({NORM: a}), a_run({NORM: b})).isel(measure=0)
    expected = scipy_stats.ttest_rel(b, a, axis=0)
    np.testing.assert_allclose(found["t"], expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(found["p"], expected.pvalue, rtol=1e-8)
    np.testing.assert_allclose(found["effect"], (b - a).mean(0) / (b - a).std(0, ddof=1))
    np.testing.assert_allclose(found["log2_ratio"], np.log2(b.mean(0) / a.mean(0)))
    assert (found["n"] == 40).all()
    q = scipy_stats.false_discovery_control(expected.pvalue.ravel()).reshape(SHAPE)
    np.testing.assert_allclose(found["q"], q, rtol=1e-8)


def test_no_pairs_against_scipy():
    a, b = norms(0, 30), norms(1, 47) * 1.2
    runs = a_run({NORM: a}), a_run({NORM: b}, ids=[f"other{i}" for i in range(47)])
    found = compare(*runs)
    assert (found.attrs["paired"], found.attrs["why_unpaired"]) == (False, "0 sample ids in common")
    expected = scipy_stats.ttest_ind(b, a, axis=0, equal_var=False)
    one = found.isel(measure=0)
    np.testing.assert_allclose(one["t"], expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(one["p"], expected.pvalue, rtol=1e-8)
    pooled = np.sqrt((29 * a.var(0, ddof=1) + 46 * b.var(0, ddof=1)) / 75)
    np.testing.assert_allclose(one["effect"], (b.mean(0) - a.mean(0)) / pooled)
    # The rival: Student's own test, which takes the variances for equal.
    student = scipy_stats.ttest_ind(b, a, axis=0, equal_var=True)
    assert not np.allclose(one["p"], student.pvalue, rtol=1e-4)


@pytest.mark.parametrize("n", [2, 3])
def test_small_numbers_in_closed_form(n):
    """Student's tail: 1 - 2 atan|t| / pi with one degree of freedom, 1 - |t| / sqrt(2 + t^2)."""
    a, b = norms(0, n), norms(1, n)
    found = compare(a_run({NORM: a}), a_run({NORM: b})).isel(measure=0)
    d = b - a
    t = d.mean(0) / (d.std(0, ddof=1) / math.sqrt(n))
    tail = 1 - 2 * np.arctan(abs(t)) / np.pi if n == 2 else 1 - abs(t) / np.sqrt(2 + t**2)
    np.testing.assert_allclose(found["t"], t)
    np.testing.assert_allclose(found["p"], tail)


@given(hnp.arrays(float, (4, 5), elements=st.integers(0, 6)), st.integers(0, 99))
def test_spearman_against_scipy(a, seed):
    b = np.random.default_rng(seed).integers(0, 6, (4, 5)).astype(float)
    found = spearman(ranked(a), ranked(b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        expected = scipy_stats.spearmanr(a.ravel(), b.ravel()).statistic
        assert found == pytest.approx(expected, abs=1e-12)


def test_mcnemar_against_scipy():
    a, b = (
        np.array([1] * 20 + [0] * 8, bool),
        np.array([1] * 13 + [0] * 7 + [1] * 2 + [0] * 6, bool),
    )
    values = {NORM: norms(0, 28)}
    found = compare(a_run(values, correct=a), a_run(values, correct=b)).attrs["accuracy"]
    assert (found["lost"], found["gained"]) == (7, 2)
    assert found["difference"] == pytest.approx(-5 / 28)
    assert found["p"] == pytest.approx(scipy_stats.binomtest(2, 9, 0.5).pvalue)
    assert compare(a_run(values), a_run(values, correct=b)).attrs["accuracy"] is None


# Laws.


@given(st.integers(0, 999), st.floats(0.1, 10), st.booleans())
@settings(deadline=None)
def test_the_other_way_round_and_another_unit(seed, scale, paired):
    a, b = norms(seed, 6), norms(seed + 1, 6)
    ids = [f"{'q' if paired else 'other'}{i}" for i in range(6)]
    there = compare(a_run({NORM: a}), a_run({NORM: b}, ids=ids))
    back = compare(a_run({NORM: b}, ids=ids), a_run({NORM: a}))
    assert there.attrs["paired"] == paired
    for name in ("difference", "t", "effect", "log2_ratio"):
        np.testing.assert_allclose(there[name], -back[name], rtol=1e-9, atol=1e-12)
    for name in ("p", "q", "n"):
        np.testing.assert_allclose(there[name], back[name], rtol=1e-9)
    assert (there["rank_a"] == back["rank_b"]).all()
    scaled = compare(a_run({NORM: scale * a}), a_run({NORM: scale * b}, ids=ids))
    np.testing.assert_allclose(scaled["difference"], scale * there["difference"], rtol=1e-6)
    for name in ("t", "p", "effect", "log2_ratio"):
        np.testing.assert_allclose(scaled[name], there[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_samples_does_not_matter(seed):
    a, b = a_run({NORM: norms(0)}), a_run({NORM: norms(1)})
    order = np.random.default_rng(seed).permutation(40)
    assert compare(a, reordered(b, order)).identical(compare(a, b))
    assert compare(reordered(a, order), b).identical(compare(a, b))


def test_pairs_see_what_neither_rival_sees():
    """One head 2 % up, where samples differ by factors: alone pairs by id single it out."""
    a = norms(0)
    b = a * (1 + 0.002 * np.random.default_rng(5).normal(size=a.shape))
    b[:, 1, 2] *= 1.02
    order = np.random.default_rng(6).permutation(40)
    left, right = a_run({NORM: a}), reordered(a_run({NORM: b}), order)
    assert list(movers(compare(left, right), NORM, 3, 0.001)[["layer", "head"]].iloc[0]) == [1, 2]
    unaligned = scipy_stats.ttest_rel(right[NORM].values, a, axis=0).pvalue
    welch = scipy_stats.ttest_ind(b, a, axis=0, equal_var=False).pvalue
    for rival in (unaligned, welch):
        assert rival[1, 2] > 0.3


# The built-in model.


@pytest.fixture(scope="module")
def questions():
    return load_questions("builtin:questions")[:60]


def tiny():
    return load_model("builtin:tiny", dtype="fp32", device_map="cpu", self_check=False)


def measured(model, questions, **settings):
    return collect(model, questions, progress=False, **settings)


@pytest.fixture(scope="module")
def base(questions):
    return measured(tiny(), questions)


def test_a_run_and_itself(base, questions):
    found = compare(base, base)
    for name in ("difference", "log2_ratio", "t", "effect"):
        assert (found[name] == 0).all()
    assert (found["p"] == 1).all()
    assert (found["q"] == 1).all()
    assert found.attrs["accuracy"]["difference"] == found.attrs["accuracy"]["lost"] == 0
    assert (found.attrs["differing"], found.attrs["cautions"]) == ([], [])
    assert all(text["spearman"] == pytest.approx(1) for text in found.attrs["measures"].values())
    assert list(found["measure"].values) == measures_of(base)


@pytest.mark.parametrize(("layer", "head"), [(1, 2), (3, 7)])
def test_one_head_scaled_is_singled_out(base, questions, layer, head):
    model, d = tiny(), base.attrs["model"]["d_head"]
    with torch.no_grad():
        weight = model.hf.model.layers[layer].self_attn.o_proj.weight
        weight[:, head * d : (head + 1) * d] *= 1.5
    found = compare(base, measured(model, questions))
    one = found.sel(measure="head_resid_contrib_norm")
    top = movers(found, "head_resid_contrib_norm", 10, 0.05).iloc[0]
    assert (top["layer"], top["head"]) == (layer, head)
    assert top["log2_ratio"] == pytest.approx(np.log2(1.5), abs=1e-6)
    rest = np.delete(abs(one["log2_ratio"].values.ravel()), layer * 8 + head)
    assert rest.max() < 0.25 * np.log2(1.5)
    assert (one["difference"].values[:layer] == 0).all()
    # z itself does not pass through the head's own W_O.
    same = found.sel(measure="head_output_norm")["difference"].values[: layer + 1]
    assert (same == 0).all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_lora_on_one_layer_and_the_same_merged(base, questions, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], layers_to_transform=[2], init_lora_weights=False
    )
    adapted = peft.get_peft_model(tiny().hf, config)
    adapted.save_pretrained(tmp_path)
    by_adapter = load_model("builtin:tiny", dtype="fp32", device_map="cpu", adapter_path=tmp_path)
    tuned = measured(by_adapter, questions)
    one = compare(base, tuned).sel(measure="head_resid_contrib_norm")
    moved = abs(one["difference"].values) > 0
    assert (moved.any(1) == [False, False, True, True]).all()
    keys = {entry["key"] for entry in compare(base, tuned).attrs["differing"]}
    assert "model.adapter" in keys
    assert all(key.startswith(("model.adapter", "weights")) for key in keys)
    merged = load_model(
        "merged", hf_model=adapted.merge_and_unload(), tokenizer=tiny().tokenizer, self_check=False
    )
    assert abs(compare(tuned, measured(merged, questions))["log2_ratio"]).max() < 1e-5


# What pairs, and what is said.


def test_only_common_samples_count():
    a, b = norms(0), norms(1)
    left, right = a_run({NORM: a}), reordered(a_run({NORM: b}), np.arange(10, 25))
    found = compare(left, right)
    np.testing.assert_allclose(found["mean_a"][0], a[10:25].mean(0))
    assert (found["n"] == 15).all()
    assert (found.attrs["n_a"], found.attrs["n_b"], found.attrs["n_common"]) == (40, 15, 15)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ids": ["q0"] * 40}, "sample ids are not unique"),
        ({"ids": [f"q{39 - i}" for i in range(40)]}, "the same ids stand for questions with"),
        ({"ids": [f"q{i + 39}" for i in range(40)]}, "1 sample ids in common"),
        ({"per_sample": False}, "not both runs hold values per sample"),
    ],
)
def test_what_does_not_pair(changes, why):
    found = compare(a_run({NORM: norms(0)}), a_run({NORM: norms(1)}, **changes))
    assert not found.attrs["paired"]
    assert found.attrs["why_unpaired"].startswith(why)
    assert (found["n"] == 80).all()


DIFFERENT = {
    "aggregation": ({"token_agg": "all"}, "A has token_agg last, B all"),
    "first token": ({"exclude_first_token": True}, "aggregation differs: A has exclude_first"),
    "dataset": ({"dataset": {"name": "e", "split": "test"}}, "A has dataset.name d, B e; only com"),
    "template": ({"template": {"name": "t", "sha256": "3"}}, "A has template.sha256 2, B 3"),
    "few-shot": ({"settings": {"few_shot": 2}}, "template differs: A has settings.few_shot 0, B 2"),
    "examples": (
        {"template": {"name": "t", "sha256": "2", "examples_sha256": "7"}},
        "template differs: A has template.examples_sha256 null, B 7",
    ),
    "BOS": ({"prepend_bos": False}, "tokenisation differs: A has prepend_bos True, B False"),
    "answer": (
        {"answer_tokens": {"A": {"token": "ĠA", "id": 7}}},
        "tokenisation differs: the answer A is token 'A' and 'ĠA'",
    ),
    "lengths": ({"n_tokens": [100] * 40}, "39 of 40 common samples differ in length"),
    "dtype": (
        {"model": {"source": "m", "dtype": "bf16"}},
        "changes of a few times 0.008 of a value may be rounding",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_else_differs_is_warned_of(name):
    changes, message = DIFFERENT[name]
    values = {NORM: norms(0)}
    with pytest.warns(UserWarning, match="differs: ") as seen:
        found = compare(a_run(values), a_run(values, **changes))
    assert [str(w.message) for w in seen] == found.attrs["cautions"]
    assert len(found.attrs["cautions"]) == 1
    assert message in found.attrs["cautions"][0]


def test_another_template_explains_other_lengths():
    other = {"template": {"name": "u", "sha256": "9"}, "n_tokens": [7] * 40}
    with pytest.warns(UserWarning, match="template differs") as seen:
        compare(a_run({NORM: norms(0)}), a_run({NORM: norms(1)}, **other))
    assert len(seen) == 1


def test_what_only_took_longer_is_no_difference():
    values = {NORM: norms(0)}
    slow = a_run(values, wall_seconds=9, settings={"few_shot": 0, "output_dir": "elsewhere"})
    assert compare(a_run(values), slow).attrs["differing"] == []
    other = a_run(values, versions={"torch": "2.13"})
    expected = [{"key": "versions.torch", "a": None, "b": "2.13"}]
    assert compare(a_run(values), other).attrs["differing"] == expected


def test_refused():
    small = a_run({NORM: norms(0)}).isel(layer=slice(2))
    with pytest.raises(InputError, match=r"same shape, found 3 layers x 5 heads and 2 layers x 5"):
        compare(a_run({NORM: norms(0)}), small)
    with pytest.raises(InputError, match="expected a measure in both runs"):
        compare(a_run({NORM: norms(0)}), a_run({SIGNED: norms(0)}))


def test_every_measure_both_hold():
    values = {NORM: norms(0), SIGNED: norms(1) - norms(2), "third": norms(3)}
    found = compare(a_run(values), a_run({k: values[k] for k in (SIGNED, NORM)}))
    assert list(found["measure"].values) == [NORM, SIGNED]
    assert found.attrs["left_out"] == ["third"]
    assert len(table(found)) == 2 * 15


def test_a_missing_layer_is_no_data():
    a = norms(0)
    a[:, 1] = np.nan
    found = compare(a_run({NORM: a}), a_run({NORM: norms(1)})).isel(measure=0)
    for name in ("difference", "t", "p", "q", "effect", "rank_a", "log2_ratio"):
        assert np.isnan(found[name].values[1]).all()
        assert np.isfinite(found[name].values[[0, 2]]).all()
    assert found["n"].values.tolist() == [[40] * 5, [0] * 5, [40] * 5]
    without = norms(0)[:, [0, 2]], norms(1)[:, [0, 2]]
    p = scipy_stats.ttest_rel(without[1], without[0], axis=0).pvalue.ravel()
    q = scipy_stats.false_discovery_control(p)
    np.testing.assert_allclose(found["q"].values[[0, 2]].ravel(), q, rtol=1e-8)
    nothing = pd.DataFrame(columns=["mean_a", "mean_b", "layer", "head"])
    found = compare(a_run({NORM: a}), a_run({NORM: norms(1)}))
    assert png(plots.figure(found, NORM, nothing, 0.05)).startswith(b"\x89PNG")


def test_the_same_change_everywhere():
    """No spread: t has no bound, and nothing breaks."""
    a = np.full((8, *SHAPE), 2.0)
    b = a.copy()
    b[:, 0, 0] += 1
    for ids in (None, [f"other{i}" for i in range(8)]):
        found = compare(a_run({NORM: a}), a_run({NORM: b}, ids=ids)).isel(measure=0)
        assert found["t"].values[0, 0] == found["effect"].values[0, 0] == np.inf
        assert (found["p"].values[0, 0], found["p"].values[1, 1]) == (0, 1)


def test_values_of_both_signs_have_no_ratio():
    a = norms(0) - 4
    found = compare(a_run({SIGNED: a}), a_run({SIGNED: a + norms(1)}))
    negative = (found["mean_a"] <= 0) | (found["mean_b"] <= 0)
    assert negative.any()
    assert (np.isnan(found["log2_ratio"]) == negative).all()
    low = compare(a_run({SIGNED: a - 90}), a_run({SIGNED: a - 90 + norms(1)}))
    rows = movers(low, SIGNED, 4, 0.05)
    assert (abs(rows["difference"]).diff().dropna() <= 0).all()
    assert len(rows) == 4
    assert len(plots.figure(low, SIGNED, rows, 0.05).panels) == 2


def test_colours_are_centred_at_no_change():
    found = compare(a_run({NORM: norms(0)}), a_run({NORM: norms(1)}))
    figure = plotly.draw(plots.figure(found, NORM, table(found), 0.05))
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == 2
    for trace in maps:
        assert trace.zmin == -trace.zmax < 0
        assert abs(np.array(trace.z)).max() == trace.zmax


# The command.


@pytest.fixture(scope="module")
def two(run_cli, small, tmp_path_factory):
    """Two run directories of one model: fp32, and bf16 on fewer questions."""
    out = tmp_path_factory.mktemp("two")
    common = [*small, "--output_dir", out]
    first = run_cli("collect", *common, "--experiment_name", "base").run_dir
    more = ["--dtype", "bf16", "--max_samples", 5, "--experiment_name", "a<b"]
    return first, run_cli("collect", *common, *more).run_dir


@pytest.fixture(scope="module")
def compared(run_cli, two, tmp_path_factory):
    return run_cli("compare", *two, "--output_dir", tmp_path_factory.mktemp("out"))


def test_files(compared, two):
    path = compared.run_dir
    found = {p.name for p in path.iterdir()}
    names = measures_of(load_run(two[0]))
    assert found == {"compare.parquet", "summary.md", "compare.html", "meta.json", "config.json",
                     *(f"{name}_change.png" for name in names)}  # fmt: skip
    rows = pd.read_parquet(path / "compare.parquet")
    columns = "layer head measure mean_a mean_b difference log2_ratio t p q effect rank_a rank_b n"
    assert list(rows) == columns.split()
    assert len(rows) == len(names) * 18
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = table(compare(*map(load_run, two)))
    pd.testing.assert_frame_equal(rows, expected)
    meta = json.loads((path / "meta.json").read_text())
    assert (meta["runs"], meta["n_common"]) == ([str(p) for p in two], 5)
    assert (meta["names"], meta["paired"]) == ([p.name for p in two], True)
    assert {e["key"] for e in meta["differing"]} >= {"model.dtype", "num_processed"}
    newest = max(path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert newest.name == "meta.json"


def test_what_is_said(compared):
    lines = compared.err.splitlines()
    assert lines[0].startswith("warning: dtype differs: ")
    assert "5 samples are in both runs" in compared.err
    summary = (compared.run_dir / "summary.md").read_text()
    assert summary in compared.err + "\n"
    assert "UserWarning" not in compared.err


def test_the_page_needs_no_network_and_escapes_names(compared):
    text = (compared.run_dir / "compare.html").read_text()
    body = text.replace(text[text.index("<script") : text.rindex("</script>")], "")
    assert "a&lt;b" in text
    assert "a<b" not in body
    assert text.count('id="plotly"') == 1
    assert 'src="http' not in text
    assert "prefers-color-scheme: dark" in text


def test_settings_do_something(run_cli, two, tmp_path):
    common = ["compare", *two, "--output_dir", tmp_path]
    short = run_cli(*common, "--top", 1, "--fdr", 0.9999, "--names", "[x,y]").run_dir
    summary = (short / "summary.md").read_text()
    assert summary.startswith("# y (B) compared to x (A)")
    heads = [line for line in summary.splitlines() if line.startswith("| ") and "head" not in line]
    assert len(heads) == len(measures_of(load_run(two[0])))
    assert "q ≤ 0.9999" in summary
    named = run_cli(*common, "--experiment_name", "mine").run_dir
    assert named.name.startswith("mine_")
    same = run_cli("compare", two[0], two[0], "--output_dir", tmp_path).run_dir
    assert "No difference at all in 18 heads." in (same / "summary.md").read_text()


BAD = {
    "one": (["a"], "expected two run directories, found 1 (a); use tl-headnorm compare RUN_A RUN"),
    "three": (["a", "b", "c"], "expected two run directories, found 3 (a, b, c)"),
    "no run": (["a", "b"], "run: expected a finished run directory with meta.json, found none in"),
    "names": (["a", "b", "--names", "[x, x]"], "names: expected two different names, found ['x'"),
    "top": (["a", "b", "--top", "0"], "top: expected 1 or more, found 0"),
    "fdr": (["a", "b", "--fdr", "1"], "fdr: expected a share between 0 and 1, found 1.0"),
    "name": (["a", "b", "--experiment_name", "x/y"], "experiment_name: expected a name without"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    result = run_cli("compare", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.error_line
    assert not list(tmp_path.iterdir())


def test_runs_of_different_shapes(run_cli, two, tmp_path, base, monkeypatch):
    from tl_headnorm.run import results

    monkeypatch.chdir(tmp_path)
    other = tmp_path / "tiny"
    other.mkdir()
    results.save_arrays(base, other)
    results.finish(base, other)
    result = run_cli("compare", two[0], other)
    assert result.code == 2
    assert "found 3 layers x 6 heads and 4 layers x 8 heads" in result.error_line
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_settings_round_trip():
    settings = CompareSettings(runs=["a", "b"], names=["x", "y"])
    assert CompareSettings(**settings.as_dict()) == settings


def test_ids_pair_in_any_order():
    a = a_run({NORM: norms(0)})
    b = reordered(a, np.arange(40)[::-1])
    (at_a, at_b), why = common_samples(a, b, [NORM])
    assert why is None
    assert (a["sample_id"].values[at_a] == b["sample_id"].values[at_b]).all()
