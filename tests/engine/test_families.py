"""Every family on HookedTransformer equals Hugging Face: logits, heads' sum, norms.

One small random Hugging Face model per family, made on the spot, all sizes odd; its biases are
random, so that one that is forgotten shows.
"""

from itertools import product

import pytest
import torch
from handmade import FAMILY_MODELS, family_model
from test_hugging_face import random_samples, worst

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.engine import hook_names, short_blocks
from tl_headnorm.engine.families import FAMILIES, has_hooked
from tl_headnorm.engine.select import engine_of
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import load_model
from tl_headnorm.model.self_check import relative_difference
from tl_headnorm.oracle import hugging_face

pytestmark = pytest.mark.skipif(
    not has_hooked(), reason="transformer-lens 4 has no HookedTransformer"
)
HOOKED = [name for name in FAMILY_MODELS if FAMILY_MODELS[name].hooked]


def inputs(seed=1, left=False):
    torch.manual_seed(seed)
    ids = torch.randint(3, 97, (3, 17))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        mask[row, slice(0, pad) if left else slice(17 - pad, 17)] = 0
    return ids, mask


def test_every_family_has_a_model_here():
    assert {FAMILY_MODELS[name].architecture for name in HOOKED} == set(FAMILIES)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", HOOKED)
def test_logits_equal_hugging_face_in_float64(name, left):
    hf_model = family_model(name, torch.float64)
    model = load_model(hf_model=hf_model, engine="hooked")
    ids, mask = inputs(left=left)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = hf_model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    ours = model.tl(ids, attention_mask=mask)
    real = mask.bool()
    # The RoPE tables are made in float32 by Hugging Face: that is what is left.
    assert relative_difference(ours[real], theirs[real]) < 5e-6


@pytest.mark.parametrize("name", HOOKED)
def test_heads_sum_to_the_attention_output(name):
    model = load_model(hf_model=family_model(name, torch.float64), engine="hooked")
    ids, mask = inputs()
    names = [hook_names.attn_out(layer) for layer in range(model.info.n_layers)]
    seen = model.engine.run_z(ids, mask, extra=names)
    for layer, out in enumerate(names):
        total = torch.einsum("bphd,hdm->bpm", seen.z[layer], model.engine.W_O(layer))
        torch.testing.assert_close(
            total + model.engine.b_O(layer), seen.extra[out], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", HOOKED)
def test_norms_equal_hugging_faces(name):
    """At the last token and over all, padded left and right, with and without shared tokens."""
    model = load_model(hf_model=family_model(name), engine="hooked", self_check=False)
    for agg, side, prefix in product(("last", "all"), ("left", "right"), (0, 9)):
        samples = random_samples(9, 2, 24, 97, prefix)
        found = worst(model, samples, token_agg=agg, padding_side=side, batch_size=4)
        assert found < 1e-4, (agg, side, prefix)


def test_the_oracle_knows_each_familys_output_projection():
    """GPT-2's Conv1D holds [in, out]: read as a Linear it gives other norms."""
    samples = random_samples(3, 4, 12, 97)
    hf_model = family_model("gpt2")
    module, weight = hugging_face.output_projections(hf_model)[0]
    assert torch.equal(weight, module.weight.T)
    right = hugging_face.measure_samples(hf_model, samples)["head_resid_contrib_norm"]
    with pytest.MonkeyPatch.context() as patch:
        wrong = [(m, m.weight) for m, _ in hugging_face.output_projections(hf_model)]
        patch.setattr(hugging_face, "output_projections", lambda _: wrong)
        rival = hugging_face.measure_samples(hf_model, samples)["head_resid_contrib_norm"]
    assert hugging_face.compare(rival, right)["worst_relative"] > 0.1


def test_qkv_cut_in_thirds_is_wrong_for_gpt_neox(monkeypatch):
    """GPT-2's order of q, k and v, applied to GPT-NeoX, must not pass."""
    from einops import rearrange

    from tl_headnorm.engine import families

    hf_model = family_model("gpt_neox")
    state = families.neox_weights(hf_model)
    fused = hf_model.gpt_neox.layers[0].attention.query_key_value.weight
    for letter, part in zip("QKV", fused.chunk(3), strict=True):
        state[f"blocks.0.attn.W_{letter}"] = rearrange(part, "(h d) m -> h m d", h=6)
    rival = families.Family(families.neox_config, lambda _: state)
    monkeypatch.setitem(families.FAMILIES, "GPTNeoXForCausalLM", rival)
    with pytest.raises(InputError, match="expected logits within"):
        load_model(hf_model=hf_model, engine="hooked")


@pytest.mark.parametrize("name", HOOKED)
def test_the_call_copies_no_weight(name):
    """TransformerLens flattens W_O and W_Q to Hugging Face's layout at every call: for free."""
    attention = load_model(hf_model=family_model(name), engine="hooked").tl.blocks[0].attn
    assert attention.W_O.permute(2, 0, 1).flatten(1).data_ptr() == attention.W_O.data_ptr()
    for W in (attention.W_Q, getattr(attention, "_W_K", attention.W_K)):
        assert W.transpose(1, 2).flatten(0, 1).data_ptr() == W.data_ptr()


@pytest.mark.parametrize("name", HOOKED)
def test_the_short_forward_serves_the_families_it_knows(name):
    tl = load_model(hf_model=family_model(name), engine="hooked").tl
    assert short_blocks.installed(tl) == (name in ("llama", "mistral", "qwen2"))


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_the_short_forward_equals_the_stock_one(name):
    tl = load_model(hf_model=family_model(name, torch.float64), engine="hooked").tl
    ids, mask = inputs(left=True)
    short = engine_of(tl).run_z(ids, mask)
    short_blocks.uninstall(tl)
    stock = engine_of(tl).run_z(ids, mask)
    real = mask.bool()
    for layer, z in short.z.items():
        torch.testing.assert_close(z[real], stock.z[layer][real])
    torch.testing.assert_close(short.resid[real], stock.resid[real])


def test_b_V_is_part_of_z():
    """Qwen2's value bias reaches z: the weights of a row of the pattern sum to 1."""
    hf_model = family_model("qwen2")
    model = load_model(hf_model=hf_model, engine="hooked")
    ids, mask = inputs()
    with_bias = model.engine.run_z(ids, mask).z[0]
    bias = hf_model.model.layers[0].self_attn.v_proj.bias
    expected = bias.view(2, 8).repeat_interleave(3, dim=0)  # two key/value heads for six
    assert expected.abs().min() > 0
    bias.data = torch.zeros_like(bias)
    without = load_model(hf_model=hf_model, engine="hooked").engine.run_z(ids, mask).z[0]
    for difference in (with_bias - without)[mask.bool()]:
        torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


WINDOW = 20


def test_a_sliding_window_bounds_the_context():
    hf_model = family_model("mistral", sliding_window=WINDOW)
    model = load_model(hf_model=hf_model, engine="hooked")
    assert model.n_ctx == WINDOW
    samples = random_samples(6, 2, WINDOW, 97)
    assert worst(model, samples, batch_size=2) < 1e-4
    longer = random_samples(2, WINDOW + 1, WINDOW + 5, 97)
    with pytest.raises(InputError, match=f"at most {WINDOW} tokens"):
        measure_samples(model, longer)
    shared = random_samples(2, 3, 5, 97, prefix=WINDOW)
    with pytest.raises(InputError, match=f"at most {WINDOW} tokens"):
        measure_samples(model, shared)


def test_ignoring_the_window_would_be_wrong():
    """The naive rival: global attention over a prompt longer than the window."""
    hf_model = family_model("mistral", sliding_window=WINDOW)
    model = load_model(hf_model=hf_model, engine="hooked")
    model.tl.cfg.n_ctx = 96
    longer = random_samples(2, WINDOW + 8, WINDOW + 12, 97)
    assert worst(model, longer) > 1e-3


def test_qwens_unused_window_bounds_nothing():
    hf_model = family_model("qwen2", use_sliding_window=False, sliding_window=WINDOW)
    assert load_model(hf_model=hf_model, engine="hooked").n_ctx == 96
    used = family_model(
        "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )
    assert load_model(hf_model=used, engine="hooked").n_ctx == WINDOW


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "tanh"}, "activation"),
    ],
)
def test_hooked_names_the_engine_that_would_work(name, changes, problem):
    with pytest.raises(InputError, match=rf"{problem}.*--engine bridge"):
        load_model(hf_model=family_model(name, **changes), engine="hooked")
