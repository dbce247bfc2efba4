"""Attention steering: closed forms, laws, Hugging Face as the oracle, and rivals that must fail."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from handmade import as_model, hooked, llama
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm.data.batches import make_batch
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Start
from tl_headnorm.engine.select import engine_of
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.generation import generate
from tl_headnorm.interventions.metrics import Letters, NextTokens
from tl_headnorm.interventions.runner import run
from tl_headnorm.interventions.steering import (
    SpanWeight,
    Steering,
    boosts_of,
    shifted_scores,
    span_mask,
    steer_hooks,
)
from tl_headnorm.measures import last_real_position
from tl_headnorm.model.loading import load_model
from tl_headnorm.settings import Settings

LENGTHS = (9, 6, 3)
SPANS = ((2, 3), (0, 4), (1,))
LETTERS = (5, 6, 7, 8)


def samples(lengths=LENGTHS, vocab=17, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Encoded(i, tuple(int(t) for t in rng.integers(1, vocab, n)), letter_ids=LETTERS)
        for i, n in enumerate(lengths)
    ]


def patterns_of(tl, batch, hooks, layers=None):
    """Every layer's pattern, with hooks in place."""
    found = {}

    def keep(layer):
        def read(pattern, hook):
            found[layer] = pattern.clone()

        return hook_names.pattern(layer), read

    readers = [keep(layer) for layer in range(tl.cfg.n_layers)]
    resid = engine_of(tl).run(Start(batch.ids), batch.mask, [*hooks, *readers])
    return found, resid


def hooks_for(steering, model, batch, spans, first_query=None):
    info = model.info
    table = boosts_of(steering, info.n_layers, info.n_heads)
    return steer_hooks(table, span_mask(spans, batch.mask), first_query)


def run_steered(model, given_samples, spans, steerings, metric, queries="all", share=True, **how):
    """The clean run, the clean weight of every steering's heads, and every steering."""
    of = {sample.index: span for sample, span in zip(given_samples, spans, strict=True)}
    heads = tuple({head for steering in steerings for head in steering.heads})
    plain = [replace(s, boost=1.0) for s in steerings]
    runs = [replace(s, spans=of, queries=queries) for s in [*plain, *steerings]]
    metric, n = SpanWeight(metric, of, heads), len(steerings)
    found = run(model, given_samples, runs, metric, settings=Settings(**how), share=share)
    weight = found.pop("weight")
    values = {name: value[[0, *range(1 + n, 1 + 2 * n)]] for name, value in found.items()}
    return SimpleNamespace(values=values, clean=weight[1 : 1 + n], weight=weight[1 + n :])


def log_table(boost, heads=1):
    return torch.full((1, heads), float(np.log(boost)), dtype=torch.float64)


@pytest.mark.parametrize("boost", [0.25, 1.0, 3.0, 50.0])
def test_a_uniform_head_gives_the_closed_form(boost):
    """Ground truth 9: boosting k of T tokens of a uniform head gives b/(k b + T - k) on each."""
    tl = hooked(n_layers=1)
    tl.blocks[0].attn.W_Q.data.zero_()
    tl.blocks[0].attn.b_Q.data.zero_()
    model, T, span = as_model(tl), 9, (1, 4, 6)
    batch = make_batch(samples((T,)), "right")
    found, _ = patterns_of(
        tl, batch, hooks_for(Steering("s", ((0, 1),), boost), model, batch, [span])
    )
    last, k = found[0][0, :, -1], len(span)
    on, off = boost / (k * boost + T - k), 1 / (k * boost + T - k)
    expected = torch.tensor([on if i in span else off for i in range(T)], dtype=torch.float64)
    torch.testing.assert_close(last[1], expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(last[0], torch.full((T,), 1 / T, dtype=torch.float64))


def causal_scores(seed, n):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, 3, n, n, generator=generator, dtype=torch.float64)
    return scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(2, 12),
    boost=st.floats(0.001, 1000), data=st.data(),
)  # fmt: skip
def test_the_shift_is_multiplying_and_renormalising(seed, n, boost, data):
    """The law of METHODS.md in float64, for every row that sees something besides the span."""
    span = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(2)]
    )
    scores = causal_scores(seed, n)
    steered = shifted_scores(scores, log_table(boost, 3), span).softmax(-1)
    factor = 1 + (boost - 1) * span.double()
    weights = scores.softmax(-1) * factor[:, None, None, :]
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(steered, expected, rtol=1e-12, atol=4e-16)
    torch.testing.assert_close(steered.sum(-1), torch.ones(2, 3, n, dtype=torch.float64))
    # The rival multiplies after the softmax and leaves it so: rows no longer sum to 1.
    sees = (scores.softmax(-1) * span[:, None, None, :]).sum(-1)
    if abs(boost - 1) > 0.1 and (sees > 0.01).any():
        assert (weights.sum(-1) - 1).abs().max() > 1e-4


def test_masked_entries_stay_masked_and_no_row_becomes_empty():
    scores = causal_scores(0, 6)
    span = torch.tensor([[True, True, False, True, False, False]] * 2)
    for boost in (0.0, 0.5, 7.0):
        log = torch.full((1, 3), -torch.inf) if boost == 0 else log_table(boost, 3)
        changed = shifted_scores(scores, log, span)
        assert (changed[scores == -torch.inf] == -torch.inf).all()
        # queries 0 and 1 see the span alone: any boost is the identity there
        assert torch.equal(changed[:, :, :2], scores[:, :, :2])
        weights = changed.softmax(-1)
        assert not weights.isnan().any()
        if boost == 0:
            assert (weights[:, :, 2:][..., [0, 1, 3]] == 0).all()
    naive = (scores + torch.where(span, -torch.inf, 0.0)[:, None, None]).softmax(-1)
    assert naive.isnan().any()
    lowest = torch.finfo(torch.float64).min
    bridged = torch.where(scores == -torch.inf, lowest, scores)
    changed = shifted_scores(bridged, log_table(9.0, 3), span)
    assert (changed[scores == -torch.inf] == lowest).all()


def test_boost_one_is_the_identity_bit_for_bit():
    model = as_model(hooked(n_layers=3, normalization_type="RMSPre"))
    scores = causal_scores(1, 7)
    assert torch.equal(shifted_scores(scores, log_table(1.0, 3), torch.ones(2, 7).bool()), scores)
    steerings = [Steering("s", ((0, 1), (2, 0)), 1.0), Steering("s", ((0, 1), (2, 0)), 4.0)]
    found = run_steered(model, samples(), SPANS, steerings, NextTokens())
    for value in found.values.values():
        assert np.array_equal(value[0], value[1], equal_nan=True)
    assert np.array_equal(found.clean[0], found.weight[0])
    assert (found.weight[1] > found.weight[0]).any()
    assert (found.values["kl"][2] > 1e-6).all()
    assert steer_hooks(boosts_of(steerings[0], 3, 3), torch.ones(1, 4).bool()) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_earlier_queries_and_other_samples_do_not_change(side):
    model = as_model(hooked(n_layers=2))
    batch = make_batch(samples(), side)
    spans = [(3,), (), ()]  # of the first sample alone
    steering = Steering("s", ((0, 0), (0, 2), (1, 1)), 30.0)
    silent = [(hook_names.scores(layer), lambda scores, hook: scores) for layer in range(2)]
    clean, before = patterns_of(model.tl, batch, silent)
    steered, after = patterns_of(model.tl, batch, hooks_for(steering, model, batch, spans))
    assert torch.equal(before[1:], after[1:])
    start = int(batch.mask[0].argmax()) + 3
    assert torch.equal(before[0, :start], after[0, :start])
    # The span's own query sees other tokens too, so it changes, as does what follows.
    assert not torch.equal(before[0, start + 1 :], after[0, start + 1 :])
    assert torch.equal(clean[0][:, 1], steered[0][:, 1])  # a head of the layer that is not steered
    rows = steered[1].sum(-1)[batch.mask.bool()[:, None].expand(-1, 3, -1)]
    torch.testing.assert_close(rows, torch.ones_like(rows))
    rival = span_mask([(3,)] * 3, make_batch(samples((9, 9, 9)), side).mask)  # one span for all
    table = boosts_of(steering, 2, 3)
    _, wide = patterns_of(model.tl, batch, steer_hooks(table, rival))
    assert not torch.equal(before[1:], wide[1:])


@pytest.mark.parametrize("queries", ["all", "last"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_and_batches_with_different_spans_change_nothing(padding_side, queries):
    """Each sample alone, without padding, is the truth."""
    model, given_samples = as_model(hooked(n_layers=3, normalization_type="RMSPre")), samples()
    steerings = [Steering("a", ((0, 1), (1, 2)), 5.0), Steering("b", ((2, 0),), 0.0),
                 Steering("c", ((1, 0),), 0.2)]  # fmt: skip
    readout = Letters([0, 1, 2])
    how = {"batch_size": 3, "padding_side": padding_side, "queries": queries}
    together = run_steered(model, given_samples, SPANS, steerings, readout, **how)
    for i, sample in enumerate(given_samples):
        alone = run_steered(model, [sample], [SPANS[i]], steerings, readout, queries)
        for name, value in alone.values.items():
            np.testing.assert_allclose(together.values[name][:, i], value[:, 0], atol=1e-13)
        np.testing.assert_allclose(together.weight[:, i], alone.weight[:, 0], atol=1e-13)
        np.testing.assert_allclose(together.clean[:, i], alone.clean[:, 0], atol=1e-13)
    rival = [tuple(place + 1 for place in span) for span in SPANS]  # off by one
    other = run_steered(model, given_samples, [s[:1] for s in rival], steerings, readout, **how)
    assert np.abs(other.values["loss"] - together.values["loss"]).max() > 1e-4


def test_starting_at_the_first_steered_layer_changes_nothing():
    model = as_model(hooked(n_layers=3, normalization_type="RMSPre"))
    steerings = [Steering(f"{la}.{h}", ((la, h),), b) for la in range(3) for h in range(3)
                 for b in (0.0, 8.0)]  # fmt: skip
    runs = [
        run_steered(model, samples(), SPANS, steerings, Letters([0, 1, 2]), share=s)
        for s in (True, False)
    ]
    for name, value in runs[0].values.items():
        np.testing.assert_allclose(value, runs[1].values[name], atol=1e-13)
    np.testing.assert_allclose(runs[0].weight, runs[1].weight, atol=1e-13)
    assert np.isfinite(runs[0].weight).all()
    assert np.isfinite(runs[0].clean).all()


def test_only_the_last_query_is_steered_where_that_is_asked_for():
    model, batch = as_model(hooked(n_layers=1)), make_batch(samples(), "left")
    last = last_real_position(batch.mask)
    steering = Steering("s", ((0, 1),), 12.0)
    clean, _ = patterns_of(model.tl, batch, [])
    found, _ = patterns_of(model.tl, batch, hooks_for(steering, model, batch, SPANS, last))
    assert torch.equal(found[0][:, :, :-1], clean[0][:, :, :-1])
    assert not torch.equal(found[0][:, 1, -1], clean[0][:, 1, -1])


def hf_logits(hf, ids, mask, per_head):
    """Hugging Face's own eager attention with an additive mask per head, the same in all layers."""
    n = ids.shape[1]
    allowed = torch.ones(n, n).tril().bool() & mask.bool()[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    additive = torch.where(allowed, torch.zeros(()), torch.full((), lowest)).expand(
        -1, per_head.shape[1], -1, -1
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hf.set_attn_implementation("eager")
    with torch.inference_mode():
        out = hf(ids, attention_mask=additive + per_head, position_ids=positions, use_cache=False)
    return out.logits


@pytest.fixture(scope="module")
def grouped():
    """A LLaMA with grouped queries (6 heads, 2 key/value heads), twice: ours and Hugging Face's."""
    return load_model(hf_model=llama(), self_check=False), llama()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_grouped_queries_equal_hugging_face_with_a_mask_per_head(grouped, padding_side):
    model, hf = grouped
    heads, boost = (1, 4), 6.0
    batch = make_batch(samples(vocab=97), padding_side)
    every = tuple((layer, head) for layer in range(3) for head in heads)
    hooks = hooks_for(Steering("s", every, boost), model, batch, SPANS)
    _, resid = patterns_of(model.tl, batch, hooks)
    ours = model.tl.unembed(model.tl.ln_final(resid))
    n = batch.ids.shape[1]
    shift = torch.zeros(3, 6, n, n)
    shift[:, list(heads)] = float(np.log(boost)) * span_mask(SPANS, batch.mask)[:, None, None, :]
    theirs = hf_logits(hf, batch.ids, batch.mask, shift)
    real = batch.mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=2e-4, atol=2e-4)
    plain = hf_logits(hf, batch.ids, batch.mask, torch.zeros_like(shift))
    assert (plain[real] - theirs[real]).abs().max() > 0.05
    # The rival that steers a whole group of queries through its key is another thing.
    shared = shift.clone()
    shared[:, :3] = shared[:, 1:2]
    grouped_keys = hf_logits(hf, batch.ids, batch.mask, shared)
    assert (grouped_keys[real] - theirs[real]).abs().max() > 0.01


def test_the_bridge_gives_the_same(grouped):
    bridged = load_model(hf_model=llama(), engine="bridge", self_check=False)
    steerings = [Steering("s", ((0, 1), (2, 4)), b) for b in (0.0, 0.3, 9.0)]
    runs = [
        run_steered(m, samples(vocab=97), SPANS, steerings, Letters([0, 1, 2]))
        for m in (grouped[0], bridged)
    ]
    np.testing.assert_allclose(runs[0].values["loss"], runs[1].values["loss"], atol=1e-4)
    np.testing.assert_allclose(runs[0].weight, runs[1].weight, atol=1e-5)
    assert np.ptp(runs[0].values["loss"], axis=0).min() > 1e-3


def test_bfloat16_steers_alike(grouped):
    """log b is rounded as scores are: the weight is that of float32 within a few percent."""
    narrow = load_model(hf_model=llama(dtype=torch.bfloat16), self_check=False)
    steerings = [Steering("s", ((0, 1), (1, 4)), b) for b in (1.0, 4.0, 20.0)]
    runs = [
        run_steered(m, samples(vocab=97), SPANS, steerings, Letters([0, 1, 2]))
        for m in (grouped[0], narrow)
    ]
    np.testing.assert_allclose(runs[1].weight, runs[0].weight, rtol=0.08, atol=0.01)
    assert np.array_equal(runs[1].values["loss"][0], runs[1].values["loss"][1])


def test_writing_with_a_cache_equals_running_everything_again(grouped):
    """Greedy text with hooks and cached keys, against the whole steered sequence at each step."""
    model = grouped[0]
    rows, spans = samples((7, 4), vocab=97), [(1, 2), (0,)]
    steering = Steering("s", ((0, 1), (1, 3), (2, 5)), 15.0)
    batch = make_batch(rows, "left")
    hooks = hooks_for(steering, model, batch, spans)
    found = generate(model, batch.ids, batch.mask, max_new_tokens=6, hooks=hooks, eos=[])
    plain = generate(model, batch.ids, batch.mask, max_new_tokens=6, eos=[])
    assert found.ids.tolist() != plain.ids.tolist()
    for row, span, new in zip(rows, spans, found.ids.tolist(), strict=True):
        ids = list(row.ids)
        for token in new:
            one = make_batch([Encoded(0, tuple(ids))], "right")
            again = hooks_for(steering, model, one, [span])
            _, resid = patterns_of(model.tl, one, again)
            assert int(model.tl.unembed(model.tl.ln_final(resid[:, -1:])).argmax()) == token
            ids.append(token)


def test_adding_to_a_feature_of_the_hidden_state_is_not_steering():
    """The rival of METHODS.md: `hidden[..., keyword_pos] += c` moves no weight to the keyword."""
    tl = hooked(n_layers=1)
    model, batch, place = as_model(tl), make_batch(samples((9,)), "right"), 3
    clean, _ = patterns_of(tl, batch, [])

    def rival(resid, hook):
        changed = resid.clone()
        changed[..., place] += 1.0
        return changed

    wrong, _ = patterns_of(tl, batch, [(hook_names.resid_pre(0), rival)])
    steering = Steering("s", ((0, 1),), 5.0)
    right, _ = patterns_of(tl, batch, hooks_for(steering, model, batch, [(place,)]))
    others = [i for i in range(9) if i != place]

    def odds(found):
        last = found[0][0, 1, -1]
        return (last[place] / last[others]) / (
            clean[0][0, 1, -1][place] / clean[0][0, 1, -1][others]
        )

    torch.testing.assert_close(odds(right), torch.full((8,), 5.0, dtype=torch.float64))
    assert odds(wrong).std() > 1e-3  # no common factor: it is not the keyword that is favoured


def test_a_boost_must_be_a_number_of_zero_or_more():
    for boost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="boost: expected 0 or a number above 0"):
            Steering("s", ((0, 0),), boost)
