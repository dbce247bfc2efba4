"""Stability, groups, pruning, rollout and the command's files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tl_headnorm.commands.attribute import stability as stab
from tl_headnorm.commands.attribute.groups import compare_groups
from tl_headnorm.commands.attribute.pruning import area, areas, numbers_pruned, pruning_orders
from tl_headnorm.commands.attribute.rollout import rollout
from tl_headnorm.commands.attribute.settings import METHODS, AttributeSettings
from tl_headnorm.errors import InputError

TINY = ROOT / "tl_headnorm" / "builtin"


def noisy_maps(rho, n=50, features=400, seed=0):
    """Maps whose pairs correlate rho: a common map and noise of their own."""
    generator = np.random.default_rng(seed)
    common, own = generator.normal(size=features), generator.normal(size=(n, features))
    return np.sqrt(rho) * common + np.sqrt(1 - rho) * own


@pytest.mark.parametrize("rho", [0.2, 0.78])
def test_one_against_n_is_what_the_mean_correlation_predicts(rho):
    maps = noisy_maps(rho)
    report = stab.stability(maps.reshape(50, 20, 20))
    assert report["mean_correlation"]["pearson"] == pytest.approx(rho, abs=0.05)
    assert report["pooled_correlation"] == pytest.approx(rho, abs=0.05)
    for row in report["growth"]:
        for key in ("pooled", "mean_r", "standardised"):
            assert row[key] == pytest.approx(row[f"{key}_predicted"], abs=0.02)
    # The rival reading: a high value at N = 50 says that one sample is as good as fifty.
    assert report["one_against_n"] > report["mean_correlation"]["pearson"] + 0.08
    low, high = report["mean_correlation_interval"]
    assert low < report["mean_correlation"]["pearson"] < high


def grown(maps, generator):
    growth = pd.DataFrame(stab.growth(maps, generator, repeats=40))
    return growth, growth["n"].to_numpy()


@examples(max_examples=10, deadline=None)
@given(
    rho=st.floats(0.2, 0.9), spread=st.floats(0.5, 1.0), seed=st.integers(0, 999),
    n=st.sampled_from([30, 60]),
)  # fmt: skip
def test_raw_maps_of_unequal_size_follow_the_pooled_correlation(rho, spread, seed, n):
    """Maps whose sizes are log-normal: the pooled rho predicts the pooled curve within its
    bootstrap interval, the lengths predict the mean of r, and the mean pairwise r neither."""
    generator = np.random.default_rng(seed)
    size = np.exp(spread * generator.normal(size=(n, 1)))
    maps = noisy_maps(rho, n, seed=seed) * size
    growth, numbers = grown(maps, generator)
    interval = stab.rho_interval(stab.covariances(maps), generator)
    low, high = (stab.predicted(r, numbers) for r in interval)
    # Below N = 5 the root of a mean and the mean of roots differ (Jensen): at most 0.06.
    slack = np.where(numbers < 5, 0.06, 0.02)
    assert ((low - slack <= growth["pooled"]) & (growth["pooled"] <= high + slack)).all()
    # Approximate between its ends: .072 is the worst found (rho .5, spread 1, n 60, seed 783).
    assert np.abs(growth["mean_r"] - growth["mean_r_predicted"]).max() < 0.1
    last = growth.iloc[-1]
    assert last["pooled"] == pytest.approx(last["pooled_predicted"], abs=1e-12)
    assert last["mean_r"] == pytest.approx(last["mean_r_predicted"], abs=1e-12)
    naive = stab.predicted(stab.mean_pair(stab.correlations(maps, "pearson")), n)
    assert naive == last["standardised_predicted"]
    assert naive - last["pooled"] > 0.02


def test_mean_r_prediction_depends_on_nothing_but_sizes_where_sizes_differ():
    """Two maps alike in all but size: by hand, pooled rho = ab / ((a^2 + b^2) / 2)."""
    row = np.random.default_rng(0).normal(size=30)
    maps = np.stack([row, 3 * row, 3 * row])
    report = stab.stability(maps.reshape(3, 5, 6))
    assert report["mean_correlation"]["pearson"] == pytest.approx(1)
    assert report["pooled_correlation"] == pytest.approx((3 + 3 + 9) / 3 / ((1 + 9 + 9) / 3))
    assert report["growth"][-1]["mean_r_predicted"] == pytest.approx(1)
    assert stab.predicted_mean_r(np.zeros((3, 4)), 2) == 0  # no map at all is no error


def test_prediction_by_hand():
    assert stab.predicted(0.78, 50) == pytest.approx(0.88566, abs=1e-5)
    assert stab.predicted(0.3, 1) == 1


def test_standardised_prediction_is_exact_at_the_whole_number():
    maps = noisy_maps(0.4) * np.random.default_rng(1).uniform(0.1, 9, (50, 1))
    unit = stab.standardised(maps)
    rho = stab.mean_pair(unit @ unit.T)
    assert stab.one_against_mean(unit) == pytest.approx(stab.predicted(rho, 50), abs=1e-12)


def test_noise_has_no_sample_specific_signal_and_a_second_pattern_has():
    noise = stab.stability(noisy_maps(0.5, features=60).reshape(50, 6, 10))
    assert noise["verdict"].split(". ")[1].startswith("No sample-specific signal")
    maps = noisy_maps(0.5, features=60)
    maps += np.random.default_rng(5).normal(size=(50, 1)) * np.random.default_rng(6).normal(size=60)
    told = stab.stability(maps.reshape(50, 6, 10))
    assert told["verdict"].split(". ")[1].startswith("Sample-specific signal")
    # The rival: the mean pair of what is left is near -1/(N-1) in both, whatever the data.
    for report in (noise, told):
        assert abs(report["mean_removed"]["rest_mean_pair"]) < 0.03


def test_variance_ranking_and_missing_heads():
    values = np.random.default_rng(0).normal(size=(9, 2, 3))
    values[:, 1, 1] *= 20
    values[:, 0, 2] = np.nan
    ranking = stab.stability(values)["variance_ranking"]
    assert (ranking[0]["layer"], ranking[0]["head"], len(ranking)) == (1, 1, 5)
    with pytest.raises(InputError, match="3 or more samples"):
        stab.stability(values[:2])


def test_groups_find_the_planted_head_and_control_the_others():
    generator = np.random.default_rng(0)
    groups = ["a", "b", "c"] * 20
    values = generator.normal(size=(60, 5, 8))
    values[np.array(groups) == "b", 3, 2] += 3
    values[:, 0, 0] = 1.5  # the same in all: no difference, not even by rounding
    table = compare_groups(values, groups, permutations=2000)
    found = table[table["differs"]]
    assert (3, 2) in set(zip(found["layer"], found["head"], strict=True))
    assert len(found) <= 2
    assert table.query("layer == 0 and head == 0")["p"].item() == 1
    # The rival: p <= 0.05 without control, over many heads where nothing differs.
    nothing = compare_groups(generator.normal(size=(60, 20, 20)), groups, permutations=300)
    assert (nothing["p"] <= 0.05).sum() > 5
    assert nothing["differs"].sum() == 0
    with pytest.raises(InputError, match="2 groups or more"):
        compare_groups(values, ["a"] * 60)


def test_rollout_is_the_explicit_product_and_leaves_pads_out():
    torch.manual_seed(0)
    raw = torch.rand(2, 1, 3, 5, 5, dtype=torch.float64).tril()
    attention = [layer / layer.sum(-1, keepdim=True) for layer in raw]
    full = rollout(attention, torch.ones(1, 5, dtype=torch.long))[0]
    steps = [(a.mean(1)[0] + torch.eye(5)) / 2 for a in attention]
    torch.testing.assert_close(full, steps[1] @ steps[0])
    torch.testing.assert_close(full.sum(-1), torch.ones(5, dtype=torch.float64))
    assert (full.triu(1) == 0).all()
    assert not torch.allclose(full, steps[0] @ steps[1])  # the rival: layers in the wrong order
    padded = rollout(attention, torch.tensor([[1, 1, 1, 0, 0]]))[0]
    torch.testing.assert_close(padded[:3, :3], full[:3, :3])
    assert (padded[3:] == 0).all()
    assert (padded[:, 3:] == 0).all()


def test_areas_and_orders_by_hand():
    numbers = numbers_pruned(6, 4)
    assert numbers.tolist() == [0, 2, 4, 6]
    assert area(np.ones(4), numbers) == pytest.approx(1)
    assert area(np.array([1.0, 1, 0, 0]), numbers) == pytest.approx(0.5)
    orders = pruning_orders({"m": np.array([[3.0, 1], [2, 9]])}, 2, seed=0)
    assert orders["m", "least_first"].tolist() == [1, 2, 0, 3]
    assert orders["m", "most_first"].tolist() == [3, 0, 2, 1]
    curves = list(orders)
    correct = np.zeros((4, 4, 10))
    correct[0], correct[1:] = 1, np.random.default_rng(0).integers(0, 2, (3, 4, 10))
    table = areas({"loss": correct, "correct": correct}, curves, numbers).set_index(
        ["method", "order"]
    )
    assert table.loc[("m", "least_first"), "accuracy_low"] == 1
    row = table.loc[("random", "random")]
    assert row["accuracy_low"] < row["accuracy_area"] < row["accuracy_high"] < 1


# -- the command, on the built-in model ------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_flags():
    file = TINY / "questions" / "test.jsonl"
    return ["--model_path", TINY / "model", "--dtype", "fp32", "--device_map", "cpu",
            "--dataset", "multiple_choice", "--data_dir", file]  # fmt: skip


@pytest.fixture(scope="module")
def run(run_cli, tiny_flags, tmp_path_factory):
    """Cheap methods with everything that can be reported of them."""
    return run_cli(
        "attribute", *tiny_flags, "--max_samples", 60, "--methods",
        "[grad_x_act, michel, atp, loo, rollout]", "--stability", "--validate",
        "--group_by", "family", "--permutations", 50, "--pruning_points", 9,
        "--output_dir", tmp_path_factory.mktemp("attribute"),
    ).run_dir  # fmt: skip


METHODS_RUN = ["grad_x_act", "michel", "atp_zero", "atp_mean", "atp_corrupted", "loo"]


def test_files_of_a_run(run):
    table = pd.read_parquet(run / "attribution.parquet")
    assert list(table.columns[:6]) == ["method", "layer", "head", "mean", "std", "stderr"]
    assert list(dict.fromkeys(table["method"])) == METHODS_RUN
    with np.load(run / "per_sample.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}
    for method, value in values.items():
        assert (value.dtype, value.shape) == (np.float32, (60, 4, 8))
        rows = table[table["method"] == method].sort_values(["layer", "head"])
        np.testing.assert_allclose(rows["mean"], value.mean(0).ravel(), rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(
            rows["stderr"], value.std(0, ddof=1).ravel() / np.sqrt(60), rtol=1e-3, atol=1e-7
        )
    np.testing.assert_allclose(values["michel"], np.abs(values["grad_x_act"]), rtol=1e-5)
    meta = json.loads((run / "meta.json").read_text())
    assert meta["completeness_error"]["michel"] is None
    assert set(meta["completeness_error"]["loo"]) >= {"worst_absolute", "mean_relative"}
    pruning = pd.read_parquet(run / "pruning.parquet")
    assert list(pruning.columns) == ["method", "order", "n_pruned", "accuracy", "loss"]
    assert set(json.loads((run / "stability.json").read_text())) == set(METHODS_RUN)
    tokens = pd.read_parquet(run / "rollout.parquet")
    np.testing.assert_allclose(tokens.groupby("sample")["rollout"].sum(), 1, atol=1e-5)
    assert len(pd.read_parquet(run / "groups.parquet")) == 6 * 32
    for name in ("attribution_maps", "pruning", "stability_loo", "groups_loo", "rank_correlation"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    html = (run / "attribution.html").read_text()
    assert 1e6 < len(html) < 9e6  # the library once, not per section
    summary = (run / "summary.md").read_text()
    for words in ("Completeness".lower(), "Stability", "Validation", "Groups", "specific signal"):
        assert words in summary


def test_nothing_pruned_is_the_model_and_all_pruned_is_the_same_for_all(run):
    pruning = pd.read_parquet(run / "pruning.parquet")
    for number in (0, 32):
        assert pruning[pruning["n_pruned"] == number]["loss"].nunique() == 1
    assert pruning[pruning["n_pruned"] == 0]["accuracy"].min() > 0.9


def test_a_method_beats_random_and_leave_one_out_is_at_the_top(run):
    """On the built-in model, by 95 % intervals that do not overlap, in both orders; the reference,
    sequential leave-one-out, is first in both, on samples that did not rank the heads."""
    table = pd.read_parquet(run / "pruning_areas.parquet")
    floor = table[table["order"] == "random"].iloc[0]
    least = table[table["order"] == "least_first"].set_index("method")
    most = table[table["order"] == "most_first"].set_index("method")
    keeps = set(least.index[least["accuracy_low"] > floor["accuracy_high"]])
    breaks = set(most.index[most["accuracy_high"] < floor["accuracy_low"]])
    assert "loo_greedy" in keeps & breaks
    assert keeps - {"loo", "loo_greedy"}
    assert breaks - {"loo", "loo_greedy"}
    assert least["accuracy_area"].idxmax() == least["loss_area"].idxmin() == "loo_greedy"
    assert most["loss_area"].idxmax() == "loo_greedy"
    assert most.loc["loo_greedy", "accuracy_area"] <= most["accuracy_high"].min()
    # Single leave-one-out, the rival, is blind to heads that stand in for each other.
    assert least.loc["loo", "accuracy_high"] < least.loc["loo_greedy", "accuracy_low"]
    assert "loo_greedy" in (run / "summary.md").read_text()


def test_stability_of_any_run(run_cli, run, finished, tmp_path):
    for source, name in ((run, "loo"), (finished, "head_output_norm")):
        done = run_cli("attribute", "--run", source, "--stability", "--output_dir", tmp_path)
        report = json.loads((done.run_dir / "stability.json").read_text())[name]
        growth = pd.DataFrame(report["growth"])
        for key in ("pooled", "mean_r", "standardised"):
            gap = growth[key] - growth[f"{key}_predicted"]
            assert abs(gap.iloc[-1]) < 1e-9, key
            assert abs(gap[growth["n"] >= 5]).max() < 0.05, key
        numbers = growth["n"].to_numpy()
        low, high = (stab.predicted(r, numbers) for r in report["pooled_correlation_interval"])
        assert growth["pooled"].between(low - 0.02, high + 0.02).all()
        assert (done.run_dir / f"stability_{name}.png").exists()
        assert "signal" in (done.run_dir / "summary.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "[lo]"], "unknown method 'lo'; did you mean 'loo'?"),
        (["--loss", "lm"], "texts: expected a text file with --loss lm"),
        (["--loss", "text", "--validate"], "validate: expected --loss letter"),
        (["--group_by", "famly"], "group_by: expected the field 'famly'"),
        (["--greedy", "3"], "greedy: expected --validate with it"),
        (["--run", "nowhere"], "run: expected --stability with it"),
        (["--run", "nowhere", "--stability"], "run: expected a finished run directory"),
        (["--gate_start", "1.0"], "gate_start: expected 0 or more and less than 1"),
        (["--validate", "--max_samples", "3"], "validate: expected 4 samples or more"),
    ],
)
def test_refusals(flags, words, run_cli, tiny_flags, tmp_path):
    common = [*tiny_flags, "--max_samples", 4, "--output_dir", tmp_path, "--methods", "[michel]"]
    result = run_cli("attribute", *common, *flags)
    assert (result.code, result.out) == (2, "")
    assert words in " ".join(result.err.split())
    assert not list(tmp_path.glob("*/meta.json"))


def test_other_losses_and_several_datasets(run_cli, tiny_flags, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The plate is in the station. The pillow is in the hall. " * 30)
    base = [*tiny_flags, "--methods", "[grad_x_act, atp_corrupted]", "--output_dir", tmp_path]
    lm = run_cli("attribute", *base, "--loss", "lm", "--texts", text, "--max_length", 64).run_dir
    answer = run_cli("attribute", *base, "--loss", "text", "--max_samples", 3).run_dir
    for path in (lm, answer):
        with np.load(path / "per_sample.npz") as arrays:
            assert all(np.abs(arrays[name]).max() > 0 for name in arrays.files)
    file = str(TINY / "questions")
    names = f"[{file}/test.jsonl, {file}/train.jsonl]"
    both = run_cli("attribute", *base, "--datasets", names, "--max_samples", 4,
                   "--permutations", 20).run_dir  # fmt: skip
    groups = pd.read_parquet(both / "samples.parquet")["group"]
    assert groups.value_counts().to_dict() == {"test": 4, "train": 4}


def test_bf16_scores_accumulate_in_float32(tiny_flags):
    """What bf16 costs: the mean map against fp32's, stated in the README."""
    from tl_headnorm.commands.attribute.attribute import attribute
    from tl_headnorm.data.questions import load_questions
    from tl_headnorm.model.loading import load_model

    file = TINY / "questions" / "test.jsonl"
    questions = load_questions("multiple_choice", file, max_samples=8)
    settings = AttributeSettings(methods=("loo", "shapley"), shapley_pairs=1)
    maps = {}
    for dtype in ("fp32", "bf16"):
        model = load_model(TINY / "model", dtype=dtype, device_map="cpu")
        maps[dtype] = attribute(model, questions, settings, progress=False)["mean"].values
    for i, method in enumerate(settings.methods):
        error = np.abs(maps["bf16"][i] - maps["fp32"][i]).max() / np.abs(maps["fp32"][i]).max()
        print(f"bf16 against fp32, {method}: {error:.3f} of the largest score")
        assert error < 0.2


def test_every_method_is_documented_with_its_cost():
    from tl_headnorm.commands.attribute import methods

    for name in METHODS:
        assert name in methods.__doc__


def test_norms_of_a_run_are_ranked_beside_the_methods(run_cli, tiny_flags, finished, tmp_path):
    from scipy.stats import spearmanr

    flags = [*tiny_flags, "--max_samples", 8, "--output_dir", tmp_path]
    collected = run_cli("collect", *flags).run_dir
    found = run_cli("attribute", *flags, "--methods", "[michel]", "--norms", collected).run_dir
    table = pd.read_parquet(found / "rank_correlation.parquet").set_index(["method", "other"])
    scores = pd.read_parquet(found / "attribution.parquet").sort_values(["layer", "head"])
    for name in ("head_output_norm", "head_resid_contrib_norm"):
        norms = np.load(collected / f"{name}_mean.npy").ravel()
        expected = spearmanr(scores["mean"], norms).statistic
        assert abs(expected) < 0.99  # a table of ones would not pass
        assert table.loc[("michel", name), "spearman"] == pytest.approx(expected, abs=1e-6)
    # A run of another model is found before anything is computed.
    before = set(tmp_path.iterdir())
    refused = run_cli("attribute", *flags, "--methods", "[michel]", "--norms", finished)
    assert refused.code == 2
    assert "norms: expected a run of a model with 4 layers of 8 heads, found head_" in refused.err
    assert set(tmp_path.iterdir()) == before
