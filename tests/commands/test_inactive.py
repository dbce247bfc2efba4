"""Inactive heads: scores and their combinations, heads switched off as they are scored, judging."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import llama
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm.commands.inactive import ranking
from tl_headnorm.commands.inactive.curves import (
    RANDOM,
    Bench,
    Curve,
    input_ablations,
    leave_one_out,
    numbered,
    random_ablations,
    rules,
    run_curves,
    static_ablations,
)
from tl_headnorm.commands.inactive.inactive import split_rows
from tl_headnorm.commands.inactive.scores import (
    Score,
    fit_logistic,
    fixed_order,
    folds,
    logistic,
    make_scores,
    mean_rank,
    rank_correlations,
    ranked,
)
from tl_headnorm.commands.inactive.settings import InactiveSettings
from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Start
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.cached_run import CachedRun
from tl_headnorm.interventions.gated_pass import Rule
from tl_headnorm.interventions.intervention import Rows
from tl_headnorm.interventions.metrics import Letters
from tl_headnorm.interventions.names import CONSTANT_REPLACEMENTS
from tl_headnorm.interventions.replacements import gather_reference
from tl_headnorm.interventions.runner import run
from tl_headnorm.measures import MEASURES, choose_measures
from tl_headnorm.measures.measurer import factors_of
from tl_headnorm.model.loading import load_model
from tl_headnorm.settings import Settings

LETTERS = (20, 21, 22, 23)
ANSWERS = [0, 3, 1, 2, 2]
SHAPE = (3, 6)


def prompts(lengths=(9, 6, 12, 7, 6), offset=0):
    rng = np.random.default_rng(3 + offset)
    rows = [tuple(int(t) for t in rng.integers(3, 90, n)) for n in lengths]
    return [Encoded(i, (1, *row), letter_ids=LETTERS) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def model():
    return load_model(hf_model=llama(dtype=torch.float64), self_check=False)


@pytest.fixture(scope="module")
def others(model):
    return gather_reference(model, prompts((8, 11, 5), offset=9))


def bench_of(model, shares=(0.2, 0.5), reference=None):
    settings = InactiveSettings(batch_size=3, shares=shares)
    return Bench(model, prompts(), ANSWERS, settings, reference)


def run_rules(model, rules, side="right", reference=None):
    """(the residual after the last block at the last token, the heads that were off) by rule."""
    rows = Rows.pad(model, prompts(), side, reference=reference)
    clean = CachedRun(rows, starts=[0], last_only=True, everywhere=rules[0].everywhere)
    runs = [rows.under(rule, {}) for rule in rules]
    resid = clean.stack([rule.hooks(one) for rule, one in zip(rules, runs, strict=True)], 0)
    return resid, torch.stack([one.found["off"] for one in runs]).bool()


def random_score(seed=0, name="any", n=8, **fields):
    rng = np.random.default_rng(seed)
    return Score(name, rng.random((n, *SHAPE)), rng.random((5, *SHAPE)), **fields)


# --- scores -----------------------------------------------------------------


def test_scores_of_a_measure_in_every_way():
    rng = np.random.default_rng(0)
    names = ("attention_first", "direct_logit")
    values = [{n: rng.random((k, *SHAPE)) for n in names} for k in (4, 3)]
    found = make_scores(choose_measures(names), *values, above=("attention_first",))
    assert [s.name for s in found] == [
        "attention_first", "attention_first>", "attention_first/layer", "attention_first/layer>",
        "direct_logit", "direct_logit/layer",
    ]  # fmt: skip
    by_name = {s.name: s for s in found}
    raw, high = by_name["attention_first"], by_name["attention_first>"]
    np.testing.assert_array_equal(raw.calibration, -high.calibration)
    assert set(raw.lowest(0.5)).isdisjoint(high.lowest(0.5))
    np.testing.assert_allclose(by_name["direct_logit/layer"].held_out.mean(2), 1)
    assert [s.looks for s in found] == [False] * 4 + [True] * 2
    assert len(make_scores(choose_measures(names), *values, normalise=False)) == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.05, 0.25, 0.5, 1.0]))
def test_a_threshold_takes_its_share_of_the_calibration(seed, share):
    score = random_score(seed, n=40)
    under = (score.calibration < score.thresholds([share])[0]).mean()
    assert abs(under - share) < 0.01
    assert len(score.lowest(share)) == round(share * 18)
    assert set(score.lowest(share / 2)) <= set(score.lowest(share))


def test_lowest_is_by_the_mean_and_leaves_out_what_is_not_defined():
    values = np.ones((3, *SHAPE))
    values[:, 1, 2] = 0.1
    values[0, 2, 5] = np.nan
    values[1:, 2, 5] = 0.2
    score = Score("a", values, values)
    assert score.lowest(2 / 18) == ((1, 2), (2, 5))
    assert np.isfinite(score.thresholds([0.1])).all()


def test_ranks_are_shares_of_smaller_values():
    among = np.array([[[1.0, 2, 2, 4]]])
    np.testing.assert_allclose(
        ranked(np.array([[[0.0, 1, 2, 3, 9, np.nan]]]), among),
        [[[0, 1 / 8, 4 / 8, 6 / 8, 1, 0.5]]],
    )


def test_mean_rank_is_blind_to_scale():
    a, b = random_score(1, "a"), random_score(2, "b")
    bent = Score("a", np.exp(9 * a.calibration), np.exp(9 * a.held_out))
    for part in ("calibration", "held_out"):
        np.testing.assert_allclose(
            getattr(mean_rank([a, b]), part), getattr(mean_rank([bent, b]), part)
        )
    np.testing.assert_allclose(mean_rank([a]).calibration.mean(), 0.5)


def test_logistic_regression_is_at_its_minimum():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 3))
    truth = np.array([2.0, -1.0, 0.0])
    y = rng.random(200) < 1 / (1 + np.exp(-(X @ truth + 0.5)))
    w = fit_logistic(X, y, ridge=0.5)

    def cost(w):
        margin = np.where(y, 1, -1) * (X @ w[:-1] + w[-1])
        return np.log1p(np.exp(-margin)).sum() + 0.25 * (w[:-1] ** 2).sum() + 5e-7 * w[-1] ** 2

    best = cost(w)
    for _ in range(200):
        assert cost(w + 0.05 * rng.standard_normal(4)) > best
    np.testing.assert_allclose(w, [2, -1, 0, 0.5], atol=0.6)


def test_a_head_s_own_effect_never_enters_its_score():
    scores = [random_score(i, str(i)) for i in range(3)]
    effect = np.random.default_rng(5).random(SHAPE)
    fold, active = folds(18, 0).reshape(SHAPE), effect > np.median(effect)
    one = next(k for k in range(5) if 0 < active[fold == k].mean() < 1)
    high, low = (np.argwhere((fold == one) & (active == kind))[0] for kind in (True, False))
    swapped = effect.copy()
    swapped[tuple(high)], swapped[tuple(low)] = effect[tuple(low)], effect[tuple(high)]
    before, after = (logistic(scores, e, seed=0).calibration for e in (effect, swapped))
    np.testing.assert_array_equal(before[:, fold == one], after[:, fold == one])
    assert (before[:, fold != one] != after[:, fold != one]).all()
    # Scores that know the effect are found, on heads they were not trained on.
    telling = Score("t", np.tile(effect, (8, 1, 1)), np.tile(effect, (5, 1, 1)))
    found = logistic([telling, *scores], effect, seed=1)
    assert np.corrcoef(found.mean.ravel(), effect.ravel())[0, 1] > 0.7


def test_rank_correlations():
    a = random_score(1, "a")
    opposite = Score("b", -np.exp(a.calibration.mean(0))[None], a.held_out)
    matrix = rank_correlations([a, opposite])
    np.testing.assert_allclose(matrix, [[1, -1], [-1, 1]])


# --- heads switched off as they are scored ----------------------------------


@pytest.mark.parametrize(
    ("name", "sign", "normalised", "method"),
    [
        ("output_norm_all", 1, False, "zero"),
        ("output_norm_all", 1, True, "mean"),
        ("contrib_norm_last", 1, True, "zero"),
        ("attention_first", -1, False, "mean"),
        ("attention_first", -1, True, "zero"),
        ("value_contribution", 1, False, "mean"),
    ],
)
def test_the_fly_is_layer_by_layer_by_hand(model, others, name, sign, normalised, method):
    """One sample at a time, one layer at a time: score, switch off, and begin again from 0."""
    thresholds = (0.4, 0.8) if sign > 0 else (-1.2, -0.5)
    if not normalised:
        found = [v for p in prompts() for v in by_hand_scores(model, p.ids, {}, None, name)]
        middle = np.quantile(sign * np.concatenate([f.ravel() for f in found]), [0.3, 0.6])
        thresholds = middle.tolist()
    rules = [
        Rule("r", MEASURES[name], factors_of(model), t, sign, normalised, method)
        for t in thresholds
    ]
    for side in ("right", "left"):
        resid, off = run_rules(model, rules, side, others)
        for t, rule in enumerate(rules):
            for row, sample in enumerate(prompts()):
                gone, last = by_hand(model, sample.ids, rule.threshold, rule, others)
                np.testing.assert_array_equal(off[t, row].numpy(), gone)
                np.testing.assert_allclose(resid[t, row, 0], last, rtol=1e-6, atol=1e-8)
    assert 0 < off.double().mean() < 1


def by_hand_scores(model, ids, gone, others, name, method="zero"):
    """Scores of every layer with some heads gone, from a plain cache: [head] per layer."""
    tl, tokens = model.tl, torch.tensor([ids])

    def edit(layer):
        def act(z, hook):
            z = z.clone()
            for head in np.flatnonzero(gone[layer]):
                z[:, :, head] = 0 if method == "zero" else others.mean[layer, head]
            return z

        return hook_names.z(layer), act

    hooked = [edit(layer) for layer in gone]
    with tl.hooks(fwd_hooks=hooked):
        _, cache = tl.run_with_cache(tokens)
    scores = []
    for layer in range(tl.cfg.n_layers):
        W_O, pattern = tl.W_O[layer], cache["pattern", layer][0]
        v = cache["v", layer][0].repeat_interleave(3, dim=1)
        z = torch.einsum("hqk,khd->qhd", pattern, v)  # what it was before it was switched off
        contribution = torch.einsum("qhd,hdm->qhm", z, W_O).norm(dim=-1)
        value = torch.einsum("khd,hdm->khm", v, W_O).norm(dim=-1)
        scores.append(
            {
                "output_norm_all": z.norm(dim=-1).mean(0),
                "contrib_norm_last": contribution[-1],
                "attention_first": pattern[:, 1:, 0].mean(1),
                "value_contribution": torch.einsum("hqk,kh->qh", pattern, value).mean(0),
            }[name].numpy()
        )
    return scores


def by_hand(model, ids, threshold, rule, others):
    gone = {}
    for layer in range(3):
        score = by_hand_scores(model, ids, gone, others, rule.measure.name, rule.method)[layer]
        score = score / np.abs(score).mean() if rule.normalised else score
        gone[layer] = rule.sign * score < threshold
    tl = model.tl

    def edit(layer):
        def act(z, hook):
            z = z.clone()
            for head in np.flatnonzero(gone[layer]):
                z[:, :, head] = 0 if rule.method == "zero" else others.mean[layer, head]
            return z

        return hook_names.z(layer), act

    with tl.hooks(fwd_hooks=[edit(layer) for layer in gone]):
        resid = tl(torch.tensor([ids]), stop_at_layer=3)[0, -1]
    return np.stack([gone[layer] for layer in range(3)]), resid


def test_the_fly_differs_from_a_clean_pass_after_the_first_layer(model):
    """The rival: thresholds on the clean pass' scores choose other heads."""
    score = make_scores(
        choose_measures("output_norm_all"),
        *(clean_values(model, ("output_norm_all",)) for _ in range(2)),
    )[0]
    bench = bench_of(model)
    fly_rules = rules(bench, score, "zero", factors_of(model))
    fly = run_curves(bench, [(score.name, "on_the_fly", "zero", 0, fly_rules)])[0]
    masks = np.stack([v.masks for v in input_ablations(bench, score, "zero")])
    off = run_rules(model, fly_rules)[1].numpy()
    np.testing.assert_array_equal(off[:, :, 0], masks[:, :, 0])
    assert (off != masks).any()
    np.testing.assert_allclose(fly.off, off.mean((2, 3)))


def clean_values(model, names):
    from tl_headnorm.commands.collect.collect import measure_samples

    values = measure_samples(model, prompts(), measures=choose_measures(names)).values
    return {name: value.astype(np.float64) for name, value in values.items()}


def test_what_the_fly_refuses(model):
    with pytest.raises(InputError, match="expected a measure that does not look at the answer"):
        run_rules(model, [Rule("r", MEASURES["direct_logit"], factors_of(model), 0.0)])


@pytest.mark.parametrize("name", ["attention_first", "output_norm_all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_fly_is_the_same_on_a_bridge(name, side):
    """Heads that are off, and the residual they leave, decided inside the pass."""
    found = []
    for engine in ("auto", "bridge"):
        one = load_model(hf_model=llama(), engine=engine)
        factors = factors_of(one)
        rules = [Rule(str(x), MEASURES[name], factors, x) for x in (0.02, 0.1, 1.0, 5.0)]
        found.append(run_rules(one, rules, side))
    (resid, off), (theirs, their_off) = found
    assert 0 < off.sum() < off.numel()
    assert torch.equal(off, their_off)
    torch.testing.assert_close(resid, theirs, rtol=1e-4, atol=1e-4)


def test_a_threshold_no_head_is_under_changes_nothing(model):
    rule = Rule("r", MEASURES["cosine_all"], factors_of(model), -2.0)
    resid, off = run_rules(model, [rule], "left")
    assert not off.any()
    batch = make_batch(prompts(), "left")
    clean = model.engine.run(Start(batch.ids), batch.mask)[:, -1]
    torch.testing.assert_close(resid[0, :, 0], clean)


# --- curves -----------------------------------------------------------------


def test_curves_are_what_the_runner_gives_and_equal_sets_run_once(model, monkeypatch):
    from tl_headnorm.commands.inactive import curves

    bench, score = bench_of(model), random_score(4)
    twin = Score("twin", 2 * score.calibration, 2 * score.held_out)
    ran = []

    def counting(model, samples, interventions, *args, **kwargs):
        ran.extend(interventions)
        return run(model, samples, interventions, *args, **kwargs)

    monkeypatch.setattr(curves, "run", counting)
    plans = [
        (s.name, mode, "zero", 0, make(bench, s, "zero"))
        for s in (score, twin)
        for mode, make in (("static", static_ablations), ("per_input", input_ablations))
    ]
    found = run_curves(bench, plans)
    assert len(ran) == 4  # two shares, two modes: the twin's are the same sets
    assert [c.score for c in found] == ["any", "any", "twin", "twin"]
    for curve, (*_, ablations) in zip(found, plans, strict=True):
        alone = run(model, prompts(), ablations, Letters(ANSWERS), settings=Settings(batch_size=1))
        np.testing.assert_allclose(curve.loss, alone["loss"][1:], rtol=1e-7)
        np.testing.assert_array_equal(curve.correct, alone["correct"][1:])
        np.testing.assert_allclose(bench.clean["loss"], alone["loss"][0], rtol=1e-7)
    np.testing.assert_allclose(found[0].off, [[4 / 18] * 5, [9 / 18] * 5])
    np.testing.assert_allclose(found[1].off, [v.masks.mean((1, 2)) for v in plans[1][4]])


def test_random_choices_are_nested_and_differ_by_seed(model):
    bench = bench_of(model)
    for mode in ("static", "per_input"):
        one, again, other = (random_ablations(bench, mode, "zero", s) for s in (0, 0, 1))
        if mode == "static":
            assert set(one[0].heads) < set(one[1].heads)
            assert [v.heads for v in one] == [v.heads for v in again]
            assert one[1].heads != other[1].heads
        else:
            assert (one[0].masks <= one[1].masks).all()
            assert (one[1].masks.sum((1, 2)) == 9).all()
            np.testing.assert_array_equal(one[1].masks, again[1].masks)
            assert (one[1].masks != other[1].masks).any()
            assert (one[1].masks[0] != one[1].masks[1]).any()


def test_leave_one_out_is_the_loss_added(model):
    effect = leave_one_out(model, prompts(), ANSWERS, Settings())
    rows = Rows.pad(model, prompts()[:1], "right")

    def loss():
        resid = model.engine.run(Start(rows.ids), rows.mask)[:, -1:]
        return float(Letters(ANSWERS).loss(rows, resid)[0])

    clean = loss()
    with model.engine.zero_heads([(1, 4)]):
        changed = loss()
    alone = leave_one_out(model, prompts()[:1], ANSWERS[:1], Settings())
    np.testing.assert_allclose(alone[1, 4], changed - clean, rtol=1e-6)
    assert effect.shape == SHAPE
    assert fixed_order("loo", effect).lowest(1 / 18)[0] == tuple(
        int(i) for i in np.unravel_index(effect.argmin(), SHAPE)
    )


def test_samples_are_numbered_by_row():
    assert [s.index for s in numbered(prompts()[2:])] == [0, 1, 2]


@pytest.mark.parametrize(("n", "share"), [(10, 0.5), (11, 0.25), (4, 0.5), (100, 0.9)])
def test_the_parts_are_apart_and_spread(n, share):
    split = split_rows(n, share)
    both = np.concatenate([split.calibration, split.held_out])
    assert sorted(both) == list(range(n))
    assert len(split.calibration) == int(n * share + 1e-9)
    assert np.diff(split.calibration).max() <= np.ceil(1 / share)


def test_too_few_samples_to_part():
    with pytest.raises(InputError, match="expected 2 samples or more to rank heads"):
        split_rows(3, 0.5)


# --- judging ----------------------------------------------------------------


def test_the_area_is_the_mean_of_the_curve():
    off, values = np.array([0, 0.1, 0.3, 0.5]), np.array([1.0, 0.9, 0.4, 0.2])
    found = ranking.area_weights(off, 0.5) @ values
    assert found == pytest.approx(np.trapezoid(values, off) / 0.5)
    assert ranking.area_weights(off, 0.5).sum() == pytest.approx(1)
    # It ends at the top, within a piece, ...
    fine = np.linspace(0, 0.4, 4001)
    exact = np.interp(fine, off, values).mean()
    assert ranking.area_weights(off, 0.4) @ values == pytest.approx(exact, abs=1e-4)
    # ... and stays level beyond its last point.
    short = ranking.area_weights(off[:3], 0.5) @ values[:3]
    assert short == pytest.approx((np.trapezoid(values[:3], off[:3]) + 0.2 * 0.4) / 0.5)
    # Two shares with the same heads off are one point.
    assert ranking.area_weights(np.array([0, 0, 0.5]), 0.5).sum() == pytest.approx(1)


def test_the_largest_share_ends_where_accuracy_first_falls():
    off = np.array([0, 0.1, 0.2, 0.3])
    accuracy = np.array([[0.9, 0.9, 0.89, 0.5], [0.9, 0.8, 0.95, 0.95], [0.9, 0.95, 0.9, 0.9]])
    np.testing.assert_allclose(ranking.largest_share(off, accuracy, 0.01), [0.2, 0, 0.3])
    np.testing.assert_allclose(ranking.largest_share(off, accuracy[0], 0.0), 0.1)


def made_curves(n=60, n_random=4, seed=0):
    """A perfect score, one like chance, and chance: correct is drawn sample by sample."""
    rng = np.random.default_rng(seed)
    shares = np.array([0.1, 0.3, 0.5])
    off = np.repeat(shares[:, None], n, 1)

    def drawn(score, p, number=0):
        correct = (rng.random((3, n)) < np.array(p)[:, None]).astype(float)
        return Curve(score, "static", "zero", off, correct, 1 - correct, number)

    curves = [drawn("good", [0.99, 0.97, 0.95]), drawn("chance", [0.8, 0.5, 0.3])]
    curves += [drawn(RANDOM, [0.8, 0.5, 0.3], i) for i in range(n_random)]
    return curves, {"correct": np.ones(n), "loss": np.zeros(n)}


def test_the_ranking_its_intervals_and_the_verdict():
    curves, clean = made_curves()
    judged = ranking.gather(curves, clean)
    assert judged[RANDOM, "static", "zero"].correct.shape == (4, 4, 60)
    table, boots = ranking.ranking(judged, top=0.5, points=1.0, repeats=400)
    assert table["score"].iloc[0] == "good"
    good = table.iloc[0]
    exact = np.trapezoid(np.r_[1, curves[0].correct.mean(1)], [0, 0.1, 0.3, 0.5]) / 0.5
    assert good["accuracy_area"] == pytest.approx(exact)
    assert good["accuracy_area_low"] < exact < good["accuracy_area_high"]
    assert list(ranking.better_than_random(table)["score"]) == ["good"]
    found = ranking.verdict(judged, table, boots, top=0.5)
    assert found.winner == ("good", "static", "zero")
    assert (found.beats_random, found.runner_up[0]) == (1.0, "chance")
    assert found.over_random[1] > 0.1
    assert (found.stays, found.among) == (1, 2)
    # The plain standard error of a mean of per-sample areas, for one curve.
    weights = ranking.area_weights(np.array([0, 0.1, 0.3, 0.5]), 0.5)
    areas = weights @ judged["good", "static", "zero"].correct[0]
    assert boots[found.winner].accuracy_area.std() == pytest.approx(
        areas.std() / np.sqrt(60), rel=0.15
    )


def test_the_choice_of_seeds_is_in_the_interval_of_chance():
    n, off = 200, np.full((1, 200), 0.5)
    curves = [
        Curve(RANDOM, "static", "zero", off, np.full((1, n), float(i % 2)), np.zeros((1, n)), i)
        for i in range(6)
    ]
    clean = {"correct": np.ones(n), "loss": np.zeros(n)}
    table, _ = ranking.ranking(ranking.gather(curves, clean), top=0.5, points=1.0, repeats=500)
    row = table.iloc[0]
    assert row["accuracy_area"] == pytest.approx(0.75)
    # No sample differs from any other: all of the width is that of the seeds.
    assert row["accuracy_area_high"] - row["accuracy_area_low"] > 0.2


def test_curves_that_miss_the_share_are_not_ranked():
    curves, clean = made_curves()
    short = Curve("short", "static", "zero", 0.1 * curves[0].off, curves[0].correct,
                  curves[0].loss)  # fmt: skip
    far = Curve("far", "static", "zero", 1.8 * curves[0].off, curves[0].correct, curves[0].loss)
    table, _ = ranking.ranking(
        ranking.gather([*curves, short, far], clean), top=0.5, points=1.0, repeats=100
    )
    by_score = table.set_index("score")["ranked"]
    assert by_score.to_dict() == {
        "good": True, "chance": True, RANDOM: True, "short": False, "far": False,
    }  # fmt: skip
    assert "short" not in set(ranking.better_than_random(table)["score"])


# --- the command ------------------------------------------------------------

FEW = ["--measures", "output_norm_all,attention_first,direct_logit", "--above", "attention_first",
       "--shares", "[0.1,0.3,0.5]", "--loo_samples", 3, "--random_orders", 2,
       "--bootstrap", 100]  # fmt: skip


@pytest.fixture(scope="module")
def ran(run_cli, small, tmp_path_factory):
    return run_cli("inactive", *small, *FEW, "--output_dir", tmp_path_factory.mktemp("inactive"))


def test_files_of_the_command(ran):
    path = ran.run_dir
    table = pd.read_parquet(path / "inactive.parquet")
    assert {"score", "mode", "method", "share", "accuracy", "loss"} <= set(table)
    assert table.iloc[0]["score"] == "clean"
    kinds = set(map(tuple, table[["score", "mode", "method"]].iloc[1:].to_numpy().tolist()))
    for method in CONSTANT_REPLACEMENTS:
        for mode in ("static", "per_input", "on_the_fly"):
            assert ("output_norm_all/layer", mode, method) in kinds
        assert ("leave_one_out", "static", method) in kinds
        assert ("mean_rank", "per_input", method) in kinds
        assert ("logistic", "per_input", method) in kinds
    # What looks at the answer never chooses per input.
    assert {m for s, m, _ in kinds if s.startswith(("direct_logit", "leave"))} == {"static"}
    assert set(table[table.score == RANDOM]["number"]) == {0, 1}
    ranking = pd.read_parquet(path / "ranking.parquet")
    assert len(ranking) == len(kinds)
    areas = ranking[ranking["ranked"]]["accuracy_area"]
    assert (areas.diff().dropna() <= 0).all()
    meta = json.loads((path / "meta.json").read_text())
    assert (meta["num_ranking"], meta["num_measuring"]) == (3, 4)
    assert meta["winner"]["score"] == ranking["score"][ranking["score"] != RANDOM].iloc[0]
    text = (path / "summary.md").read_text()
    assert "wins here" in text
    assert "Sandoval-Segura" in text
    for name in ("inactive.png", "inactive.html", "heads.parquet", "per_sample.npz",
                 "rank_correlation.parquet", "config.json"):  # fmt: skip
        assert (path / name).stat().st_size > 100
    with np.load(path / "per_sample.npz") as stored:
        rows = table.iloc[1:]
        np.testing.assert_allclose(stored["correct"].mean(2).ravel(), rows["accuracy"], rtol=1e-6)
        assert set(stored["calibration"]).isdisjoint(stored["held_out"])


def test_from_a_finished_run_and_with_attributions(ran, run_cli, small, tmp_path):
    collected = run_cli(
        "collect", *small, "--measures", "output_norm_all,attention_first,direct_logit",
        "--output_dir", tmp_path,
    ).run_dir  # fmt: skip
    attributed = run_cli(
        "attribute", *small, "--methods", "[grad_x_act,atp_zero]", "--output_dir", tmp_path
    ).run_dir
    path = run_cli(
        "inactive", *small, *FEW, "--run", collected, "--attributions", f"[{attributed}]",
        "--modes", "static,per_input", "--method", "zero", "--output_dir", tmp_path,
    ).run_dir  # fmt: skip
    again, first = (pd.read_parquet(p / "inactive.parquet") for p in (path, ran.run_dir))
    keys = ["score", "mode", "method", "number", "share"]
    both = again.merge(first, on=keys, suffixes=("", "_first"))
    assert len(both) > 50
    np.testing.assert_allclose(both["loss"], both["loss_first"], rtol=1e-4)
    heads = pd.read_parquet(path / "heads.parquet")
    # grad_x_act is negative where a head is useful, atp_zero positive; both are its negative.
    np.testing.assert_allclose(
        heads["attribution:grad_x_act"], heads["attribution:atp_zero"], atol=1e-6
    )
    with np.load(attributed / "per_sample.npz") as stored:
        exact = -stored["grad_x_act"][[1, 3, 5]].mean(0)  # the questions that rank
    np.testing.assert_allclose(heads["attribution:grad_x_act"], exact.ravel(), atol=1e-6)
    assert "means over 3 of its questions" in (path / "summary.md").read_text()


def test_runs_that_do_not_fit_are_refused(run_cli, small, finished, tmp_path):
    few = [*small, "--output_dir", tmp_path]
    for flags, message in (
        (
            ["--run", finished, "--measures", "cosine_all"],
            "expected per-sample values of cosine_all",
        ),
        (["--run", finished, "--template_name", "cloze"], "expected a run with the template cloze"),
        (["--attributions", f"[{finished}]"], "expected a finished attribute run"),
        (["--modes", "static,fly"], "unknown mode 'fly'"),
        (["--method", "gaussian"], "unknown method 'gaussian'"),
        (["--shares", "[0.5,0.1]"], "expected an ascending list"),
        (["--shares", "[0.5,1.5]"], "expected parts between 0 and 1"),
        (["--calibration_share", "1"], "expected a share between 0 and 1"),
        (["--random_orders", "0"], "random_orders: expected 1 or more"),
        (["--above", "cosine_al"], "above: expected measures that are tried"),
        (["--measures", "cosine_al"], "did you mean 'cosine_all'"),
    ):
        result = run_cli("inactive", *few, *flags)
        assert result.code == 2
        assert message in result.error_line, result.error_line
    assert not list(tmp_path.iterdir())


def test_settings_in_words():
    from conftest import ROOT

    from tl_headnorm.cli import parse

    name, given = parse(["inactive", "--config", str(ROOT / "configs" / "inactive.yaml")])
    assert (name, given.chosen_modes) == ("inactive", ("static", "per_input", "on_the_fly"))
    assert given.methods == CONSTANT_REPLACEMENTS
    chosen = InactiveSettings(modes="static, static", method="mean,zero")
    assert (chosen.chosen_modes, chosen.methods) == (("static",), ("mean", "zero"))


def test_the_built_in_model_can_do_without_many_heads(run_cli, tmp_path):
    """At least one score does better than chance with intervals that do not overlap."""
    from tl_headnorm.commands.inactive.ranking import better_than_random

    path = run_cli(
        "inactive", "--model_path", "builtin:tiny", "--dataset", "builtin:questions",
        "--device_map", "cpu", "--max_samples", 48, "--measures", "output_norm_all",
        "--above", "", "--modes", "static", "--method", "zero", "--loo_samples", 0,
        "--shares", "[0.2,0.35,0.5]", "--output_dir", tmp_path,
    ).run_dir  # fmt: skip
    table = pd.read_parquet(path / "ranking.parquet")
    assert "output_norm_all/layer" in set(better_than_random(table)["score"])
    found = table.set_index("score")["loss_area_high"]["output_norm_all/layer"]
    assert found < table.set_index("score")["loss_area_low"][RANDOM]
