"""The two engines: what the bridge computes, what auto chooses, and what the caller keeps."""

import logging

import numpy as np
import pytest
import torch
from handmade import FAMILY_MODELS, family_model, llama
from test_hugging_face import NAMES, random_samples, worst

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.engine import families, select
from tl_headnorm.engine.families import has_hooked
from tl_headnorm.engine.protocol import Start
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import load_model
from tl_headnorm.model.self_check import check_model, relative_difference
from tl_headnorm.oracle import hugging_face

needs_hooked = pytest.mark.skipif(
    not has_hooked(), reason="transformer-lens 4 has no HookedTransformer"
)


def inputs(left=False):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 17))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        mask[row, slice(0, pad) if left else slice(17 - pad, 17)] = 0
    return ids, mask


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_bridge_equals_hugging_face(name):
    hf_model = family_model(name)
    loaded = load_model(hf_model=hf_model, engine="bridge")
    assert loaded.info.engine == "bridge"
    assert max(check_model(loaded).values()) < 1e-5
    for left in (False, True):
        ids, mask = inputs(left)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        theirs = hf_model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        ours = loaded.engine.logits(loaded.engine.run(Start(ids), mask))
        assert relative_difference(ours[mask.bool()], theirs[mask.bool()]) < 1e-5
    for token_agg in ("last", "all"):
        for side in ("left", "right"):
            samples = random_samples(9, 2, 24, 97, prefix=6)
            settings = {"token_agg": token_agg, "padding_side": side, "batch_size": 4}
            assert worst(loaded, samples, **settings) < 1e-4


@needs_hooked
@pytest.mark.parametrize("name", [n for n in FAMILY_MODELS if FAMILY_MODELS[n].hooked])
def test_the_two_engines_agree(name):
    hf_model = family_model(name)
    samples = random_samples(9, 2, 24, 97, prefix=6)
    found = [
        measure_samples(load_model(hf_model=hf_model, engine=e), samples, token_agg="all").values
        for e in ("hooked", "bridge")
    ]
    for measure in NAMES:
        ours, theirs = (f[measure].astype(np.float64) for f in found)
        assert hugging_face.compare(ours, theirs)["worst_relative"] < 1e-4


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_bridges_prefix_changes_nothing(name, left):
    """Gemma 2's window counts positions: a gap of padding in a row would be felt."""
    engine = load_model(hf_model=family_model(name), engine="bridge").engine
    ids, mask = inputs(left)
    head = torch.randint(3, 97, (1, 9))
    seen = engine.run_z(ids, mask, prefix=engine.run_prefix(head[0].tolist()))
    resid = engine.run(Start(ids), mask, prefix=engine.run_prefix(head[0].tolist()))
    for row in range(3):
        real = mask[row].bool()
        alone = torch.cat([head, ids[row][real][None]], 1)
        truth = engine.run_z(alone, torch.ones_like(alone))
        for layer, z in truth.z.items():
            torch.testing.assert_close(seen.z[layer][row][real], z[0, 9:], rtol=0, atol=1e-4)
        torch.testing.assert_close(seen.resid[row][real], truth.resid[0, 9:], rtol=0, atol=1e-4)
        torch.testing.assert_close(resid[row][real], truth.resid[0, 9:], rtol=0, atol=1e-4)


def test_zeroing_heads_on_the_bridge():
    engine = load_model(hf_model=llama(), engine="bridge").engine
    ids, mask = inputs()
    names = [engine.head_sum_name(1)]
    with engine.zero_heads([(1, head) for head in range(6)]):
        seen = engine.run_z(ids, mask, extra=names)
    assert seen.extra[names[0]].abs().max() == 0  # this family has no b_O
    assert engine.run_z(ids, mask, extra=names).extra[names[0]].abs().max() > 0


def test_the_callers_model_stays_as_it_was():
    hf_model = llama()
    before = {name: type(module) for name, module in hf_model.named_modules()}
    attention = hf_model.config._attn_implementation
    assert attention != "eager"  # else the test shows nothing
    loaded = load_model(hf_model=hf_model, engine="bridge")
    assert hf_model.config._attn_implementation == attention
    assert {name: type(module) for name, module in hf_model.named_modules()} == before
    assert loaded.hf is hf_model
    ours = loaded.tl.original_model.model.layers[0].self_attn.q_proj
    theirs = hf_model.model.layers[0].self_attn.q_proj
    assert ours.weight.untyped_storage().data_ptr() == theirs.weight.untyped_storage().data_ptr()


def test_the_bridge_as_it_comes_would_change_the_callers_model():
    """The naive rival: the model itself handed to the bridge."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model = llama()
    before = {name: type(module) for name, module in hf_model.named_modules()}
    build_bridge_from_module(hf_model, "LlamaForCausalLM", hf_config=hf_model.config)
    assert {name: type(module) for name, module in hf_model.named_modules()} != before


def test_a_tokenizer_is_not_changed(bpe):
    before = (bpe.pad_token, bpe.padding_side, len(bpe))
    loaded = load_model(hf_model=llama(vocab_size=len(bpe)), tokenizer=bpe, engine="bridge")
    assert (bpe.pad_token, bpe.padding_side, len(bpe)) == before
    assert loaded.tokenizer is bpe


def test_auto_says_once_that_it_takes_the_bridge(caplog):
    select._said.clear()
    with caplog.at_level(logging.WARNING, "tl_headnorm"):
        for _ in range(2):
            loaded = load_model(hf_model=family_model("gemma2"), engine="auto")
    assert loaded.info.engine == "bridge"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("engine: bridge (")


@needs_hooked
def test_auto_takes_hooked_where_it_knows_the_family(caplog):
    assert load_model(hf_model=llama()).info.engine == "hooked"
    assert not caplog.messages
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 24}  # fmt: skip
    assert load_model(hf_model=llama(rope_parameters=yarn)).info.engine == "bridge"


def test_hooked_is_refused_where_it_is_gone(monkeypatch):
    for module in (select, families):
        monkeypatch.setattr(module, "has_hooked", lambda: False)
    with pytest.raises(InputError, match=r"expected transformer-lens 3\.9 .*--engine bridge"):
        load_model(hf_model=llama(), engine="hooked")
    assert load_model(hf_model=llama()).info.engine == "bridge"


def test_unknown_engine_and_unknown_architecture():
    with pytest.raises(InputError, match="auto, hooked, bridge, found 'brigde'; did you mean"):
        load_model(hf_model=llama(), engine="brigde")

    from transformers import LlamaForCausalLM

    class Unheard(LlamaForCausalLM):
        pass

    with pytest.raises(InputError, match=r"expected an architecture .* found Unheard"):
        load_model(hf_model=Unheard(llama().config))


def test_quantized_weights_are_refused():
    hf_model = llama()
    hf_model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(InputError, match="found quantized ones \\(bitsandbytes\\)"):
        load_model(hf_model=hf_model)


@pytest.mark.parametrize("token_agg", ["last", "all"])
def test_commands_run_on_the_bridge(run_cli, small, tmp_path, token_agg):
    """collect stamps the engine and its check against Hugging Face; validate passes."""
    import json

    flags = [*small, "--engine", "bridge", "--token_agg", token_agg, "--output_dir", tmp_path]
    meta = json.loads(
        (run_cli("collect", *flags, "--validate_samples", 4).run_dir / "meta.json").read_text()
    )
    assert meta["model"]["engine"] == "bridge"
    assert meta["validated_against_hf"] < 1e-4
    assert run_cli("validate", *flags, "--validate_samples", 4).code == 0


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_answers_on_the_bridge_are_hugging_faces(llama_dir, questions_file, scoring):
    """Accuracy needs what comes after the heads: final norm, unembedding, shared prompts."""
    from tl_headnorm import load_questions
    from tl_headnorm.commands.evaluate.evaluate import evaluate, score_cloze
    from tl_headnorm.commands.evaluate.settings import EvaluateSettings
    from tl_headnorm.data.templates import get_template

    loaded = load_model(llama_dir, dtype="fp32", device_map="cpu", engine="bridge")
    questions = load_questions("arc_challenge", questions_file, "test")
    settings = EvaluateSettings(scoring=scoring, max_length=400)
    assert evaluate(loaded, questions, settings, progress=False) is not None
    if scoring == "cloze":
        template = get_template("cloze")
        found = score_cloze(loaded, questions[:2], template, settings).logprobs
        for question, scores in zip(questions[:2], found, strict=True):
            for option, score in zip(question.options, scores, strict=True):
                assert abs(option_logprob(loaded, template.render(question), option) - score) < 1e-3


def option_logprob(loaded, prompt, option):
    """By Hugging Face alone, the whole text at once."""
    from tl_headnorm.data.tokens import common_prefix_length, token_ids

    bare, whole = token_ids(loaded.tokenizer, [prompt, f"{prompt} {option}"])
    start = 1 + common_prefix_length(bare, whole)
    ids = torch.tensor([[loaded.tokenizer.bos_token_id, *whole]])
    scores = torch.log_softmax(loaded.hf(ids).logits[0].detach(), -1)
    return float(scores[start - 1 : -1].gather(1, ids[0, start:, None]).sum())


def test_a_device_map_of_several_places(llama_dir):
    """Two entries, one device here: accelerate and the bridge take it, HookedTransformer not."""
    pytest.importorskip("accelerate")
    with pytest.raises(InputError, match="expected one device for HookedTransformer"):
        load_model(llama_dir, dtype="fp32", device_map="balanced", engine="hooked")
    places = {"": "cpu"}
    loaded = load_model(llama_dir, dtype="fp32", device_map=places, engine="bridge")
    assert worst(loaded, random_samples(5, 3, 20, 97)) < 1e-4


@pytest.mark.parametrize("places", [{"a": 0, "b": "cpu"}, {"a": 0, "b": "disk"}])
def test_layers_that_did_not_fit_are_refused(places):
    hf_model = llama()
    hf_model.hf_device_map = places
    with pytest.raises(InputError, match=f"found some put on {places['b']} for want of memory"):
        load_model(hf_model=hf_model)


def test_both_lines_are_tested_with_the_same_versions():
    from conftest import ROOT

    lines = [
        {line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")}
        for name in ("constraints.txt", "constraints-tl4.txt")
    ]
    assert lines[0] ^ lines[1] == {"transformer-lens==3.9.0", "transformer-lens==4.3.0"}


@pytest.mark.parametrize("name", FAMILY_MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_bridge_begins_at_any_layer(name, layer):
    engine = load_model(hf_model=family_model(name), engine="bridge", self_check=False).engine
    ids, mask = inputs(left=True)
    point = f"blocks.{layer}.hook_resid_pre"
    truth = engine.run_z(ids, mask, extra=[point])
    start = truth.extra[point].clone().requires_grad_()
    seen = []
    hooks = [(point, lambda resid, hook: seen.append(resid))]
    found = engine.run(Start(layer=layer, resid=start), mask, hooks)
    torch.testing.assert_close(found, truth.resid, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0], start)
    found.sum().backward()
    assert start.grad is not None
    assert start.grad.abs().max() > 0


STUDIES = {
    "ablate": [],
    "massive": [],
    "inactive": ["--measures", "output_norm_all,attention_first", "--shares", "[0.2,0.5]"],
    "attribute": ["--steps", 4, "--methods", "[grad_x_act, ig_joint, ig_layer, loo, rollout]"],
}


@pytest.mark.parametrize("command", STUDIES)
def test_studies_run_on_the_bridge(run_cli, small, tmp_path, command):
    """And give what HookedTransformer gives, where there is one."""
    import pandas as pd

    n_samples = 4 if command == "inactive" else 2
    flags = [*small, "--dataset", "arc_challenge", "--max_samples", n_samples, *STUDIES[command]]
    engines = ["bridge", "hooked"] if has_hooked() else ["bridge"]
    runs = {}
    for engine in engines:
        result = run_cli(command, *flags, "--engine", engine, "--output_dir", tmp_path / engine)
        assert result.code == 0, result.err
        tables = sorted(result.run_dir.glob("*.parquet"))
        assert tables
        runs[engine] = {path.name: pd.read_parquet(path) for path in tables}
    for name, table in runs[engines[-1]].items():
        pd.testing.assert_frame_equal(runs["bridge"][name], table, rtol=1e-3, atol=1e-4)
