"""Families that the bridge alone knows: logits, prefixes and late starts are the model's own."""

import pytest
import torch
from handmade import family_model

from tl_headnorm.engine.protocol import Start
from tl_headnorm.model.loading import load_model
from tl_headnorm.model.random_models import FamilyModel
from tl_headnorm.model.self_check import check_model

GROUPED = {"hidden_size": 48, "num_key_value_heads": 2}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
SIZES = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 96, "n_inner": 72}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
SCALES = {
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}
FAMILIES = {
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 20, "layer_types": KINDS}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED | {"pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED | {"pad_token_id": 0}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED | SCALES),
    "falcon": ("FalconForCausalLM", "FalconConfig", {"hidden_size": 48, "alibi": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | MOE),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {"hidden_size": 48, "rotary_dim": 4} | SIZES),
}  # fmt: skip
READS = ("resid_pre", "v", "pattern", "z")
CLOSE = {"rtol": 0, "atol": 2e-5}
HEAD = 9


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    hf_model = family_model(FamilyModel(*FAMILIES[request.param], hooked=False))
    return load_model(hf_model=hf_model, engine="bridge", self_check=False)


@pytest.fixture(params=[False, True], ids=["right", "left"])
def inputs(request):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 17))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        mask[row, slice(0, pad) if request.param else slice(17 - pad, 17)] = 0
    return ids, mask


def read(engine, ids, mask, **how):
    found = {}
    return found, engine.run_layers(ids, mask, found.__setitem__, reads=READS, **how)


def test_logits_are_hugging_faces(model, inputs):
    ids, mask = inputs
    assert max(check_model(model).values()) < 1e-5
    places = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = model.hf(input_ids=ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    resid = model.engine.run(Start(ids), mask)
    ours = model.engine.logits(resid)[mask.bool()]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    few = model.engine.token_logits(resid[mask.bool()], torch.tensor([[5, 60]]).repeat(35, 1))
    torch.testing.assert_close(few, theirs[:, [5, 60]], rtol=1e-4, atol=1e-4)


def test_a_prefix_and_a_late_start_change_nothing(model, inputs):
    ids, mask = inputs
    engine, real = model.engine, mask.bool()
    clean, resid = read(engine, ids, mask)
    for layer in (1, 2):
        late = engine.run(Start(layer=layer, resid=clean[layer]["resid_pre"]), mask)
        torch.testing.assert_close(late[real], resid[real], **CLOSE)
    head = torch.randint(3, 97, (1, HEAD))
    prefix = engine.run_prefix(head[0].tolist())
    found, end = read(engine, ids, mask, prefix=prefix)
    for row in range(3):
        alone = torch.cat([head, ids[row][real[row]][None]], 1)
        truth, last = read(engine, alone, torch.ones_like(alone))
        torch.testing.assert_close(end[row][real[row]], last[0, HEAD:], **CLOSE)
        keys = torch.cat([torch.ones(HEAD, dtype=torch.bool), real[row]])
        for layer, expected in truth.items():
            for what in ("resid_pre", "v", "z"):
                ours = found[layer][what][row][real[row]]
                torch.testing.assert_close(ours, expected[what][0, HEAD:], **CLOSE)
            pattern = found[layer]["pattern"][row][:, real[row]][..., keys]
            torch.testing.assert_close(pattern, expected["pattern"][0, :, HEAD:], **CLOSE)


def test_the_layers_below_a_late_start_are_not_computed(model, inputs):
    ids, mask = inputs
    engine, calls = model.engine, []
    clean, _ = read(engine, ids, mask)
    point = [(f"blocks.{i}.mlp.hook_out", lambda x, hook, i=i: calls.append(i)) for i in range(3)]
    engine.run(Start(layer=2, resid=clean[2]["resid_pre"]), mask, point)
    assert calls == [2]
    engine.run(Start(ids), mask, point)
    assert calls == [2, 0, 1, 2]
