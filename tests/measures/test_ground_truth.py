"""Hand-built models whose answer is known: null head, padding, twins under grouped queries."""

import numpy as np
import pytest
import torch
from handmade import as_model, hooked

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.select import engine_of

TOKENS = [1, 5, 3, 11, 8, 2, 13, 4, 9]
OUTPUT, CONTRIBUTION = "head_output_norm", "head_resid_contrib_norm"


def samples(*lengths):
    return [Encoded(i, tuple(TOKENS[:n])) for i, n in enumerate(lengths)]


def test_null_head_has_output_but_no_contribution():
    tl = hooked(n_layers=1)
    tl.blocks[0].attn.W_O[2] = 0
    tl.blocks[0].attn.W_V[2] *= 3
    values = measure_samples(as_model(tl), samples(9, 6)).values
    assert (values[OUTPUT][:, 0, 2] > 0.1).all()
    assert (values[CONTRIBUTION][:, 0, 2] == 0).all()
    assert (values[CONTRIBUTION][:, 0, :2] > 0.1).all()
    # What an ablation says of the same head, and what ||z|| alone would have made of it.
    ids = torch.tensor([TOKENS])
    clean = tl(ids)
    effects = []
    for head in range(3):
        with engine_of(tl).zero_heads([(0, head)]):
            effects.append((tl(ids) - clean).abs().max().item())
    assert effects[2] == 0
    assert min(effects[:2]) > 0.1
    assert values[OUTPUT][0, 0].argmax() == 2  # the rival: "the strongest head"


def test_linear_model_leave_one_out_is_the_contribution():
    """One layer, no norm: dropping head h moves the residual by exactly ||z_h W_O^h||."""
    tl = hooked(n_layers=1)
    ids, mask = torch.tensor([TOKENS]), torch.ones(1, len(TOKENS), dtype=torch.long)
    clean = engine_of(tl).run_z(ids, mask).resid
    values = measure_samples(as_model(tl), samples(9)).values[CONTRIBUTION]
    for head in range(3):
        with engine_of(tl).zero_heads([(0, head)]):
            without = engine_of(tl).run_z(ids, mask).resid
        moved = (clean - without)[0, -1].norm().item()
        assert values[0, 0, head] == pytest.approx(moved, rel=1e-6)


def plain_norms(tl, n, token_agg):
    """Norms of one prompt on its own, no padding, no package code but the hook names."""
    _, cache = tl.run_with_cache(torch.tensor([TOKENS[:n]]))
    out, contribution = [], []
    for layer in range(tl.cfg.n_layers):
        z = cache["z", layer][0]
        vectors = torch.einsum("phd,hdm->phm", z, tl.blocks[layer].attn.W_O)
        pick = (lambda x: x[-1]) if token_agg == "last" else (lambda x: x.mean(0))
        out.append(pick(z.norm(dim=-1)).numpy())
        contribution.append(pick(vectors.norm(dim=-1)).numpy())
    return {OUTPUT: np.array(out), CONTRIBUTION: np.array(contribution)}


@pytest.mark.parametrize("token_agg", ["last", "all"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_padding_and_batching_change_nothing(token_agg, padding_side, batch_size):
    tl = hooked()
    lengths = (9, 6, 3, 5)  # in batches of 3: chunks 3 + 1
    found = measure_samples(
        as_model(tl),
        samples(*lengths),
        batch_size=batch_size,
        padding_side=padding_side,
        token_agg=token_agg,
    ).values
    for row, n in enumerate(lengths):
        truth = plain_norms(tl, n, token_agg)
        for name, value in truth.items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-6)


def test_the_padding_test_can_fail(monkeypatch):
    """A double that takes mask.sum(1) - 1 for the last token is wrong on the left, only there."""
    from tl_headnorm.measures import measurer

    monkeypatch.setattr(measurer, "last_real_position", lambda mask: mask.sum(1) - 1)
    tl = hooked()
    truth = [plain_norms(tl, n, "last")[OUTPUT] for n in (9, 6, 3)]
    by_side = {
        side: measure_samples(
            as_model(tl), samples(9, 6, 3), batch_size=3, padding_side=side
        ).values[OUTPUT]
        for side in ("right", "left")
    }
    np.testing.assert_allclose(by_side["right"], truth, rtol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(by_side["left"], truth, rtol=1e-2)


@pytest.fixture
def twins():
    """Heads 0 and 1 read alike and write W_O and -W_O; head 2 and 3 share the other KV head."""
    tl = hooked(n_layers=1, n_heads=4, n_key_value_heads=2)
    attention = tl.blocks[0].attn
    attention.W_Q[1] = attention.W_Q[0]
    attention.b_Q[1] = attention.b_Q[0]
    attention.W_O[1] = -attention.W_O[0]
    return tl


def test_grouped_query_twins(twins):
    values = measure_samples(as_model(twins), samples(9, 4)).values
    for name in (OUTPUT, CONTRIBUTION):
        np.testing.assert_allclose(values[name][:, 0, 0], values[name][:, 0, 1], rtol=1e-7)
        assert (np.abs(values[name][:, 0, 0] - values[name][:, 0, 2]) > 1e-3).all()
    ids, mask = torch.tensor([TOKENS]), torch.ones(1, 9, dtype=torch.long)
    z = engine_of(twins).run_z(ids, mask).z
    with engine_of(twins).zero_heads([(0, 0)]):
        spared = engine_of(twins).run_z(ids, mask).z
    assert (spared[0][:, :, 0] == 0).all()
    torch.testing.assert_close(spared[0][:, :, 1:], z[0][:, :, 1:])
    # Opposite effects on any direction: leaving out either moves the residual oppositely.
    clean = engine_of(twins).run_z(ids, mask).resid
    moves = []
    for head in (0, 1):
        with engine_of(twins).zero_heads([(0, head)]):
            moves.append(clean - engine_of(twins).run_z(ids, mask).resid)
    torch.testing.assert_close(moves[0], -moves[1])


def test_zeroing_the_shared_value_kills_both_twins(twins):
    """The rival: editing hook_v for one head takes its twin along, so it is no head ablation."""

    def zero_first_value_head(v, hook):
        return torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)

    ids, mask = torch.tensor([TOKENS]), torch.ones(1, 9, dtype=torch.long)
    with twins.hooks(fwd_hooks=[("blocks.0.attn.hook_v", zero_first_value_head)]):
        z = engine_of(twins).run_z(ids, mask).z
    assert (z[0][:, :, :2] == 0).all()
    assert (z[0][:, :, 2:].abs() > 0).any()
