"""The engine protocol by both engines: readers, edits, prefixes, tails, late starts and stops."""

import pytest
import torch
from handmade import FAMILY_MODELS, family_model

from tl_headnorm.engine import hook_names, short_blocks
from tl_headnorm.engine.bridge import BridgeEngine
from tl_headnorm.engine.families import has_hooked
from tl_headnorm.engine.protocol import Start, Tail
from tl_headnorm.model.loading import load_model

READS = ("resid_pre", "v", "pattern", "z")
CLOSE = {"rtol": 0, "atol": 2e-5}
HEAD = 9


HOOKED = [name for name, family in FAMILY_MODELS.items() if family.hooked and has_hooked()]
EVERY = [(name, "hooked") for name in HOOKED] + [(name, "bridge") for name in FAMILY_MODELS]


def loaded(name, engine):
    return load_model(hf_model=family_model(name), engine=engine, self_check=False).engine


def inputs(left):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 17))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        mask[row, slice(0, pad) if left else slice(17 - pad, 17)] = 0
    return ids, mask


def noting(calls):
    """Hooks that note which layers' MLPs were computed."""
    return [(hook_names.mlp_out(i), lambda out, hook, i=i: calls.append(i)) for i in range(3)]


def read(engine, ids, mask, **how):
    found = {}
    resid = engine.run_layers(ids, mask, found.__setitem__, reads=READS, **how)
    return found, resid


@pytest.fixture(params=EVERY, ids="-".join)
def engine(request):
    return loaded(*request.param)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", HOOKED)
def test_both_engines_read_the_same(name, left):
    ids, mask = inputs(left)
    real = mask.bool()
    (ours, resid), (theirs, their_resid) = (
        read(loaded(name, engine), ids, mask) for engine in ("hooked", "bridge")
    )
    torch.testing.assert_close(resid[real], their_resid[real], **CLOSE)
    assert list(ours) == list(theirs) == [0, 1, 2]
    for layer, found in ours.items():
        assert set(found) == set(theirs[layer]) == set(READS)
        for what in READS:
            a, b = found[what], theirs[layer][what]
            a, b = (a.transpose(1, 2), b.transpose(1, 2)) if what == "pattern" else (a, b)
            torch.testing.assert_close(a[real], b[real], **CLOSE)


@pytest.mark.parametrize("left", [False, True])
def test_a_prefix_changes_nothing_that_is_read(engine, left):
    """Each row by itself, without padding or prefix, is the truth; keys are prefix and prompt."""
    ids, mask = inputs(left)
    head = torch.randint(3, 97, (1, HEAD))
    prefix = engine.run_prefix(head[0].tolist(), reads=READS, on_layer=lambda layer, read: None)
    found, resid = read(engine, ids, mask, prefix=prefix)
    for row, real in enumerate(mask.bool()):
        alone = torch.cat([head, ids[row][real][None]], 1)
        truth, end = read(engine, alone, torch.ones_like(alone))
        torch.testing.assert_close(resid[row][real], end[0, HEAD:], **CLOSE)
        keys = torch.cat([torch.ones(HEAD, dtype=torch.bool), real])
        for layer, expected in truth.items():
            for what in ("resid_pre", "v", "z"):
                ours = found[layer][what][row][real]
                torch.testing.assert_close(ours, expected[what][0, HEAD:], **CLOSE)
            pattern = found[layer]["pattern"][row][:, real]
            torch.testing.assert_close(
                pattern[..., keys], expected["pattern"][0, :, HEAD:], **CLOSE
            )
            assert not pattern[..., ~keys].any()
            values = engine.prefix_values(prefix, layer)[0]
            torch.testing.assert_close(values, expected["v"][0, :HEAD], **CLOSE)


def test_a_prefix_serves_many_batches(engine):
    ids, mask = inputs(left=True)
    prefix = engine.run_prefix([5, 6, 7])
    first, second = (engine.run(Start(ids), mask, prefix=prefix) for _ in range(2))
    assert torch.equal(first, second)
    assert set(prefix.z) == {0, 1, 2}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_returned_tensor_replaces_z(engine, left, with_prefix):
    ids, mask = inputs(left)
    prefix = engine.run_prefix([5, 6, 7]) if with_prefix else None

    def without_head_two(layer, read):
        edited = read["z"].clone()
        edited[:, :, 2] = 0
        return edited if layer == 1 else None

    found = engine.run_layers(ids, mask, without_head_two, prefix=prefix, edits=True)
    with engine.zero_heads([(1, 2)]):
        expected = engine.run(Start(ids), mask, prefix=prefix)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], **CLOSE)
    clean = engine.run(Start(ids), mask, prefix=prefix)
    assert (found[real] - clean[real]).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [1, 2])
def test_a_late_start_runs_no_layer_below(engine, layer):
    ids, mask = inputs(left=True)
    point = hook_names.resid_pre(layer)
    clean = engine.run_z(ids, mask, extra=[point])
    calls = []
    watch = noting(calls)
    found = engine.run(Start(layer=layer, resid=clean.extra[point]), mask, watch)
    torch.testing.assert_close(found[mask.bool()], clean.resid[mask.bool()], **CLOSE)
    assert engine.starts_late
    assert calls == list(range(layer, 3))
    engine.run(Start(ids), mask, watch)  # and afterwards all of them do
    assert calls[3 - layer :] == [0, 1, 2]


def test_a_pass_stops_before_a_layer(engine):
    ids, mask = inputs(left=False)
    point = hook_names.resid_pre(2)
    expected = engine.run_z(ids, mask, extra=[point]).extra[point]
    done = []
    found = engine.run(Start(ids), mask, noting(done), stop=2)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert done == [0, 1]


@pytest.mark.parametrize("z_everywhere", [False, True])
@pytest.mark.parametrize("resid", [False, True])
def test_a_tail_gives_the_last_position(engine, z_everywhere, resid):
    ids, mask = inputs(left=False)
    last = torch.tensor([16, 11, 5])
    clean = engine.run_z(ids, mask)
    done = []
    with engine.hooks(noting(done)):
        found = engine.run_z(ids, mask, tail=Tail(last, z_everywhere, resid))
    rows = torch.arange(3)
    for layer, z in found.z.items():
        ours = z[rows, last] if z_everywhere else z[:, 0]
        torch.testing.assert_close(ours, clean.z[layer][rows, last], **CLOSE)
    assert found.resid.shape[:2] == (3, 1)
    if resid:
        torch.testing.assert_close(found.resid[:, 0], clean.resid[rows, last], **CLOSE)
    else:
        assert found.resid.shape[2] == engine.cfg.d_model
    assert done[:2] == [0, 1]
    if isinstance(engine, BridgeEngine) or short_blocks.installed(engine.tl):
        assert (2 in done) == resid


def test_the_final_norm_is_the_models(engine):
    """direct_logit rests on it: weight, scale and centring give the model's own logits."""
    engine.cfg.output_logits_soft_cap = 0.0  # Gemma 2 bends logits afterwards
    torch.manual_seed(0)
    resid = 3 * torch.randn(4, engine.cfg.d_model)
    tokens = torch.randint(3, 97, (4, 5))
    counts, answers = torch.tensor([5, 4, 3, 2]), torch.tensor([4, 0, 2, 1])
    logits = engine.token_logits(resid, tokens)
    norm = engine.final_norm
    zero = engine.token_logits(torch.full_like(resid, 0), tokens)  # biases alone
    direct = torch.einsum(
        "bm,bm->b", resid, engine.answer_directions(tokens, counts, answers)
    ) / engine.final_scale(resid)
    for row in range(4):
        known = (logits - zero)[row, : counts[row]]
        right = int(answers[row])
        others = torch.cat([known[:right], known[right + 1 :]])
        expected = known[right] - others.mean()
        torch.testing.assert_close(direct[row], expected, rtol=2e-3, atol=2e-3)
    assert norm.eps < 1e-3
