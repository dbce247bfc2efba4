"""The bridge's attention without its weights in full equals the one that forms them."""

import pytest
import torch
from handmade import family_model

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Start
from tl_headnorm.model.loading import load_model

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(params=["llama", "qwen3", "gpt2", "gemma2"])
def engine(request):
    return load_model(hf_model=family_model(request.param), engine="bridge").engine


@pytest.fixture(params=[False, True], ids=["right", "left"])
def inputs(request):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 17))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        mask[row, slice(0, pad) if request.param else slice(17 - pad, 17)] = 0
    return ids, mask


def watching(engine, seen):
    return [(hook_names.pattern(i), lambda x, hook: seen.append(x)) for i in range(engine.n_layers)]


def test_z_and_residual_are_those_with_the_pattern_watched(engine, inputs):
    ids, mask = inputs
    real, seen = mask.bool(), []
    short = engine.run_z(ids, mask)
    with engine.hooks(watching(engine, seen)):
        full = engine.run_z(ids, mask)
    assert len(seen) == engine.n_layers
    torch.testing.assert_close(short.resid[real], full.resid[real], **CLOSE)
    for layer, z in short.z.items():
        torch.testing.assert_close(z[real], full.z[layer][real], **CLOSE)


@pytest.mark.parametrize("point", ["z", "q", "k", "v"])
def test_edits_reach_the_output_in_both_forms(engine, inputs, point):
    """The hook must cut the model, not watch it."""
    ids, mask = inputs
    real, name = mask.bool(), getattr(hook_names, point)(1)
    edits = [(name, lambda x, hook: 0 * x)]
    clean, short = engine.run(Start(ids), mask), engine.run(Start(ids), mask, edits)
    full = engine.run(Start(ids), mask, [*edits, *watching(engine, [])])
    torch.testing.assert_close(short[real], full[real], **CLOSE)
    assert (short[real] - clean[real]).abs().max() > 1e-3


def test_no_pattern_is_formed_where_none_is_watched(monkeypatch, inputs):
    engine = load_model(hf_model=family_model("llama"), engine="bridge").engine
    ids, mask = inputs
    calls = []
    point = engine.tl.blocks[1].attn.hook_pattern
    original = point.forward
    monkeypatch.setattr(point, "forward", lambda x: calls.append(1) or original(x))
    engine.run_z(ids, mask)
    assert not calls
    engine.run(Start(ids), mask, [(hook_names.scores(1), lambda x, hook: None)])
    assert calls


def test_gradients_are_the_same_in_both_forms(engine, inputs):
    ids, mask = inputs
    found = []
    for more in ([], watching(engine, [])):
        gate = torch.ones(6, requires_grad=True)
        scale = (hook_names.z(1), lambda z, hook, gate=gate: z * gate[:, None])
        engine.run(Start(ids), mask, [scale, *more])[mask.bool()].pow(2).sum().backward()
        found.append(gate.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
