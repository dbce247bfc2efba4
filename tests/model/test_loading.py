"""Loading: HookedTransformer on Hugging Face's own tensors, equal to it, proven at load."""

import socket

import numpy as np
import pytest
import torch
from handmade import llama

from tl_headnorm.engine import hook_names
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import load_model
from tl_headnorm.model.self_check import check_model, relative_difference

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS = {
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": LINEAR},
    "other rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "attention biases": {"attention_bias": True},
    "no head_dim given": {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 1},
    "long context": {"max_position_embeddings": 5000},
}


def randomise_biases(hf):
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_face_in_float64(variant):
    hf = llama(dtype=torch.float64, **VARIANTS[variant])
    randomise_biases(hf)
    model = load_model(hf_model=hf)
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 60))
    ours, theirs = model.tl(ids, attention_mask=torch.ones_like(ids)), hf(ids).logits
    # The RoPE tables are made in float32 by Hugging Face: that is what is left.
    assert relative_difference(ours, theirs) < 2e-6


def test_context_is_the_configs_own_and_long_positions_are_right():
    hf = llama(max_position_embeddings=5000, num_hidden_layers=1)
    model = load_model(hf_model=hf)
    assert model.n_ctx == 5000
    ids = torch.randint(0, 97, (1, 2500))  # past TransformerLens' first rotary table of 2048
    assert relative_difference(model.tl(ids)[:, -50:], hf(ids).logits[:, -50:]) < 1e-4


def test_weights_are_shared_not_copied():
    hf = llama(tie_word_embeddings=True)
    model = load_model(hf_model=hf)
    block, theirs = model.tl.blocks[1], hf.model.layers[1]
    pairs = [
        (block.attn.W_Q, theirs.self_attn.q_proj.weight),
        (block.attn._W_K, theirs.self_attn.k_proj.weight),
        (block.attn._W_V, theirs.self_attn.v_proj.weight),
        (block.attn.W_O, theirs.self_attn.o_proj.weight),
        (block.mlp.W_in, theirs.mlp.up_proj.weight),
        (block.mlp.W_gate, theirs.mlp.gate_proj.weight),
        (block.mlp.W_out, theirs.mlp.down_proj.weight),
        (model.tl.embed.W_E, hf.model.embed_tokens.weight),
        (model.tl.unembed.W_U, hf.model.embed_tokens.weight),
        (block.ln1.w, theirs.input_layernorm.weight),
    ]
    for ours, original in pairs:
        assert ours.untyped_storage().data_ptr() == original.untyped_storage().data_ptr()


def test_heads_sum_to_the_attention_output():
    model = load_model(hf_model=llama(dtype=torch.float64, attention_bias=True))
    ids = torch.arange(20)[None]
    names = [hook_names.attn_out(layer) for layer in range(3)]
    seen = model.engine.run_z(ids, torch.ones_like(ids), extra=names)
    z, outputs = seen.z, seen.extra
    for layer, name in enumerate(names):
        total = torch.einsum("bphd,hdm->bpm", z[layer], model.engine.W_O(layer))
        torch.testing.assert_close(
            total + model.engine.b_O(layer), outputs[name], rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_directory_loads_without_network(llama_dir, dtype, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = load_model(llama_dir, dtype=dtype, device_map="cpu")
    assert model.info.dtype == dtype
    assert model.info.source == str(llama_dir)
    assert model.tokenizer is not None


def test_hub_id_comes_from_the_cache_when_offline(llama_dir, tmp_path, monkeypatch):
    """The layout the hub's client keeps: blobs under a snapshot, named by a ref."""
    import shutil

    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    shutil.copytree(llama_dir, repo / "snapshots" / revision)
    import huggingface_hub.constants as constants
    import transformers.utils.hub as hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_model("someone/some-model", dtype="fp32", device_map="cpu")
    assert model.info.source == "someone/some-model"
    assert model.info.revision == revision
    with pytest.raises(InputError, match="someone/other"):
        load_model("someone/other", dtype="fp32", device_map="cpu")


def test_unknown_rope_scaling_and_mlp_biases_are_refused():
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 24}  # fmt: skip
    with pytest.raises(InputError, match=r"RoPE scaling .* found 'yarn'"):
        load_model(hf_model=llama(rope_parameters=yarn), engine="hooked")
    with pytest.raises(InputError, match="mlp_bias"):
        load_model(hf_model=llama(mlp_bias=True), engine="hooked")


def test_self_check_catches_a_wrong_weight():
    model = load_model(hf_model=llama())
    assert max(check_model(model).values()) < 1e-5
    good = model.tl.blocks[0].attn.W_Q
    model.tl.blocks[0].attn.W_Q = torch.nn.Parameter(good.flip(0).clone(), requires_grad=False)
    with pytest.raises(InputError, match="expected logits within"):
        check_model(model)


def test_self_check_catches_a_folded_value_bias():
    """What weight processing would do to W_O's meaning: b_V moved into b_O changes z."""
    hf = llama(attention_bias=True, num_key_value_heads=6)
    randomise_biases(hf)
    model = load_model(hf_model=hf)
    attention = model.tl.blocks[1].attn
    with torch.no_grad():
        folded = attention.b_O + torch.einsum("hd,hdm->m", attention.b_V, attention.W_O)
        attention.b_V = torch.nn.Parameter(torch.zeros_like(attention.b_V), requires_grad=False)
        attention.b_O = torch.nn.Parameter(folded, requires_grad=False)
    check_model(model)  # logits are the same: only the comparison of z can tell
    ids = torch.arange(8)[None]
    z = model.engine.run_z(ids, torch.ones_like(ids)).z
    raw = load_model(hf_model=hf).engine.run_z(ids, torch.ones_like(ids)).z
    assert not np.allclose(z[1], raw[1], atol=1e-2)


def test_self_check_catches_hooks_that_do_not_reach(monkeypatch):
    from contextlib import nullcontext

    model = load_model(hf_model=llama())
    monkeypatch.setattr(type(model.engine), "zero_heads", lambda engine, heads: nullcontext())
    with pytest.raises(InputError, match="expected zeroing head"):
        check_model(model)
