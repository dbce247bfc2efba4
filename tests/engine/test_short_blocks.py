"""The short forward equals the stock one, and steps aside where anything else is watched."""

import pytest
import torch
from handmade import llama

from tl_headnorm.engine import hook_names, short_blocks
from tl_headnorm.engine.protocol import Tail
from tl_headnorm.engine.select import engine_of
from tl_headnorm.model.loading import load_model


@pytest.fixture(params=["grouped", "ungrouped"])
def tl(request):
    kv = {"grouped": 2, "ungrouped": 6}[request.param]
    hf = llama(dtype=torch.float64, num_key_value_heads=kv, attention_bias=True)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return load_model(hf_model=hf).tl


def inputs(left=False):
    torch.manual_seed(3)
    ids = torch.randint(3, 97, (3, 11))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 4, 7)):
        mask[row, slice(0, pad) if left else slice(11 - pad, 11)] = 0
    return ids, mask


@pytest.mark.parametrize("left", [False, True])
def test_every_fired_hook_point_sees_the_stock_values(tl, left):
    ids, mask = inputs(left)
    real = mask.bool()
    names = [f"blocks.{layer}.{point}" for layer in range(3) for point in short_blocks.FIRED]
    fired = engine_of(tl).run_z(ids, mask, extra=names)
    short_blocks.uninstall(tl)
    stock = engine_of(tl).run_z(ids, mask, extra=names)
    assert not short_blocks.installed(tl)
    assert set(fired.extra) == set(stock.extra) == set(names)
    for name in names:
        found, expected = fired.extra[name], stock.extra[name]
        if name.endswith("pattern"):  # [batch, head, q, k]
            found, expected = found.transpose(1, 2), expected.transpose(1, 2)
            # Where no key is real there is no weight, in either.
            assert torch.equal(found.sum(-1) > 0, expected.sum(-1) > 0)
        torch.testing.assert_close(found[real], expected[real])
    torch.testing.assert_close(fired.resid[real], stock.resid[real])


def test_watching_any_other_point_runs_the_stock_forward(tl, monkeypatch):
    ids, mask = inputs()
    _, cache = tl.run_with_cache(ids, attention_mask=mask)
    rows = cache["pattern", 1].sum(-1)
    torch.testing.assert_close(rows[0], torch.ones_like(rows[0]))
    calls = []
    block = tl.blocks[1]
    original = block.stock_forward
    block.stock_forward = lambda *a, **k: calls.append(1) or original(*a, **k)
    engine_of(tl).run_z(ids, mask)
    assert not calls
    engine_of(tl).run_z(ids, mask, extra=["blocks.1.attn.hook_attn_scores"])
    assert calls


def test_editing_reaches_the_output_as_in_the_stock_forward(tl):
    ids, mask = inputs()
    with engine_of(tl).zero_heads([(0, 1), (2, 3)]):
        short = engine_of(tl).run_z(ids, mask).resid
    short_blocks.uninstall(tl)
    with engine_of(tl).zero_heads([(0, 1), (2, 3)]):
        stock = engine_of(tl).run_z(ids, mask).resid
    torch.testing.assert_close(short[mask.bool()], stock[mask.bool()])


def test_gradients_equal_the_stock_ones(tl):
    ids, mask = inputs()
    found = []
    for _ in range(2):
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)

        def scale(z, hook, gate=gate):
            return z * gate[:, None]

        with tl.hooks(fwd_hooks=[(hook_names.z(1), scale)]):
            tl(ids, attention_mask=mask)[mask.bool()].pow(2).sum().backward()
        found.append(gate.grad)
        if short_blocks.installed(tl):
            short_blocks.uninstall(tl)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("z_everywhere", "resid"), [(False, True), (True, True), (False, False)])
def test_a_prefix_and_a_tail_change_nothing(tl, left, installed, z_everywhere, resid):
    ids, mask = inputs(left)
    head = torch.randint(3, 97, (1, 9)).expand(3, 9)
    whole = torch.cat([head, ids], dim=1), torch.cat([torch.ones_like(head), mask], dim=1)
    truth = engine_of(tl).run_z(*whole)
    if not installed:
        short_blocks.uninstall(tl)
    last = 10 - mask.flip(1).argmax(1)
    prefix = engine_of(tl).run_prefix(head[0].tolist())
    seen = engine_of(tl).run_z(
        ids,
        mask,
        prefix=prefix,
        tail=Tail(last, z_everywhere=z_everywhere, resid=resid),
    )
    rows = torch.arange(3)
    for layer in range(3):
        z = seen.z[layer]
        if z_everywhere:
            torch.testing.assert_close(
                z[mask.bool()], truth.z[layer][:, 9:][mask.bool()], rtol=0, atol=1e-6
            )
        else:
            assert z.shape[1] == 1
            torch.testing.assert_close(z[:, 0], truth.z[layer][rows, 9 + last], rtol=0, atol=1e-6)
    if resid:
        torch.testing.assert_close(seen.resid[:, 0], truth.resid[rows, 9 + last], rtol=0, atol=1e-5)
    assert len(prefix) == 9


def test_the_last_block_does_no_more_than_asked(tl):
    ids, mask = inputs()
    done = []
    block = tl.blocks[-1]
    block.mlp.register_forward_hook(lambda *_: done.append("mlp"))
    watch = [f"blocks.{len(tl.blocks) - 1}.{p}" for p in ("hook_mlp_out", "hook_attn_out")]
    tail = Tail(torch.tensor([10, 6, 3]), z_everywhere=False, resid=False)
    assert engine_of(tl).run_z(ids, mask, tail=tail, extra=watch).extra == {}
    tail = Tail(tail.last, z_everywhere=False, resid=True)
    seen = engine_of(tl).run_z(ids, mask, tail=tail, extra=watch).extra
    assert all(value.shape[1] == 1 for value in seen.values())


def test_a_mask_changed_in_place_is_seen(tl):
    ids, mask = inputs()
    before = engine_of(tl).run_z(ids, mask).resid
    mask[0, :5] = 0
    after = engine_of(tl).run_z(ids, mask).resid
    assert not torch.allclose(before[0, -1], after[0, -1])


def test_models_with_unknown_parts_keep_the_stock_forward():
    from handmade import hooked

    assert not short_blocks.install(hooked())
