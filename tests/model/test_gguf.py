"""GGUF files: written with the gguf package's writer from models whose values are known."""

import json
import sys

import gguf
import pytest
import torch
from conftest import SIZES, command_line
from gguf_files import neighbours_paired, rounded, tensors_of, write_gguf
from handmade import llama

from tl_headnorm import load_model
from tl_headnorm.data.tokens import token_ids
from tl_headnorm.errors import InputError
from tl_headnorm.model.gguf import halves_paired
from tl_headnorm.model.pretrained import check_not_quantized

# Rows are multiples of 32, a block of the simple quantisations; no two sizes are alike.
BLOCKS = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 24, "num_hidden_layers": 3,
          "max_position_embeddings": 256}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
TEXTS = ("Which planet is closest to the Sun?\n\nA: 12  34\n", "  two\n 5 é 你好 don't")


def made(tokenizer, architecture="llama", seed=0, **changes):
    """A small random model of an architecture, wide enough for heads to differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1,
        **{"tie_word_embeddings": False, **BLOCKS, **changes},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2)
        if "norm" in name:
            parameter += 1
    return model


def logits(model, ids):
    hf = getattr(model, "hf", model)
    with torch.no_grad():
        return hf(torch.tensor([ids])).logits


@pytest.fixture(scope="module")
def ids(bpe):
    return bpe(TEXTS[0])["input_ids"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_logits_are_those_written(architecture, tied, bpe, ids, tmp_path):
    model = made(bpe, architecture, tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model, bpe, architecture=architecture)
    loaded = load_model(tmp_path / "m.gguf", dtype="fp32", device_map="cpu")  # with its self-check
    written, read = model.state_dict(), loaded.hf.state_dict()
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert (loaded.hf.lm_head.weight is loaded.hf.model.embed_tokens.weight) == tied
    assert loaded.info.architecture == type(model).__name__


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_give_their_own_dequantisation(kind, bpe, ids, tmp_path):
    model = made(bpe)
    path = write_gguf(tmp_path / "m.gguf", model, bpe, kind=kind)
    exact = logits(model, ids)
    loaded = load_model(path, dtype="fp32", device_map="cpu")
    assert torch.equal(logits(loaded, ids), logits(rounded(model, kind), ids))
    assert not torch.equal(logits(loaded, ids), exact)  # it is not the original's
    assert loaded.info.gguf["quantization"] == {kind: 2 + 7 * 3, "F32": 1 + 2 * 3}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("engine", ["auto", "bridge"])
def test_weights_are_ordinary_in_every_data_type_and_engine(dtype, engine, bpe, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", made(bpe), bpe, kind="Q4_1")
    loaded = load_model(path, dtype=dtype, engine=engine, device_map="cpu")
    assert {p.dtype for p in loaded.hf.parameters()} == {loaded.hf.dtype}
    assert loaded.info.dtype == dtype
    assert not hasattr(loaded.hf.config, "quantization_config")


def test_rows_of_q_and_k_are_put_back_and_the_rival_is_not(bpe, ids, tmp_path):
    weight = torch.randn(6 * 10, 7)
    assert torch.equal(halves_paired(neighbours_paired(weight, 6), 6), weight)
    assert not torch.equal(halves_paired(weight, 6), weight)
    model = made(bpe)
    plain = {"blk.0.attn_q.weight": model.model.layers[0].self_attn.q_proj.weight.numpy()}
    path = write_gguf(tmp_path / "rival.gguf", model, bpe, tensors=plain)
    rival = load_model(path, dtype="fp32", device_map="cpu")
    assert (logits(rival, ids) - logits(model, ids)).abs().max() > 1e-2


def rope_factors(model):
    """By what LLaMA 3's scaling divides the frequencies, by Hugging Face's own two tables."""
    default = model.config.rope_parameters["rope_theta"] ** (
        -torch.arange(0, BLOCKS["head_dim"], 2) / BLOCKS["head_dim"]
    )
    return (default / model.model.rotary_emb.inv_freq).numpy()


def test_llama_3s_rope_scaling_is_read_from_its_tensor(bpe, ids, tmp_path):
    model = made(bpe, rope_parameters=dict(LLAMA3), max_position_embeddings=131072)
    factors = rope_factors(model)
    assert factors.max() == pytest.approx(32)
    assert factors.min() == pytest.approx(1)
    path = write_gguf(tmp_path / "m.gguf", model, bpe, tensors={"rope_freqs.weight": factors})
    loaded = load_model(path, dtype="fp32", device_map="cpu")
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-5)
    rival = load_model(write_gguf(tmp_path / "r.gguf", model, bpe), dtype="fp32", device_map="cpu")
    assert not torch.allclose(logits(rival, ids), logits(model, ids), atol=1e-3)


def test_linear_rope_scaling(bpe, ids, tmp_path):
    model = made(bpe, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    keys = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", model, bpe, **keys)
    loaded = load_model(path, dtype="fp32", device_map="cpu")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_hugging_faces_own_load_gives_the_same_weights_and_is_let_pass(bpe, tmp_path):
    """An independent conversion; its config says quantised, its tensors are floats."""
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", made(bpe), bpe, kind="Q4_1")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ours = load_model(path, dtype="fp32", device_map="cpu").hf.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())
    assert theirs.config.quantization_config.quant_method == "gguf"
    assert load_model(hf_model=theirs).info.engine in ("hooked", "bridge")
    packed = llama()
    packed.config.quantization_config = {"quant_method": "gguf"}
    packed.lm_head.weight = torch.nn.Parameter(
        packed.lm_head.weight.to(torch.uint8), requires_grad=False
    )
    with pytest.raises(InputError, match=r"found quantized ones \(gguf\)"):
        check_not_quantized(packed.config, packed)
    packed.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match="bitsandbytes"):
        check_not_quantized(packed.config, llama())


def test_the_tokenizer_and_chat_template_come_from_the_file_alone(bpe, tmp_path):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    path = write_gguf(
        tmp_path / "m.gguf", made(bpe), bpe, tokenizer__chat_template=template,
        tokenizer__ggml__add_bos_token=True,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "other", "bos_token": "x"}')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    found = load_model(path, dtype="fp32", device_map="cpu").tokenizer
    assert found.chat_template == template
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    assert token_ids(found, TEXTS) == token_ids(bpe, TEXTS)
    assert [found.decode(x) for x in token_ids(found, TEXTS)] == list(TEXTS)
    assert token_ids(found, ["<s>"]) == token_ids(bpe, ["<s>"])


def test_smollms_digits_are_split_first(bpe, tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    model = made(bpe)
    path = write_gguf(tmp_path / "m.gguf", model, bpe, tokenizer__ggml__pre="smollm")
    found = load_model(path, dtype="fp32", device_map="cpu").tokenizer
    split = Sequence([Digits(True), ByteLevel(False, use_regex=True)])
    for text in TEXTS:
        pieces = [
            piece for piece, _ in found.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ]
        assert pieces == [piece for piece, _ in split.pre_tokenize_str(text)]


def test_an_unknown_way_to_split_is_said(bpe, tmp_path, caplog):
    path = write_gguf(tmp_path / "m.gguf", made(bpe), bpe, tokenizer__ggml__pre="poro-chat")
    load_model(path, dtype="fp32", device_map="cpu")
    assert "poro-chat" in caplog.text


def test_a_sentencepiece_vocabulary(shared_data, tmp_path):
    """stories260K as a GGUF file of kind llama: the same tokens, BOS added, the same logits."""
    source = load_model(shared_data / "stories260K", dtype="fp32", device_map="cpu")
    vocabulary = json.loads(source.tokenizer.backend_tokenizer.to_str())["model"]
    rank = {"".join(pair): -float(i) for i, pair in enumerate(vocabulary["merges"])}
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    kinds = [6 if t.startswith("<0x") else 3 if t in ("<s>", "</s>") else 1 for t in tokens]
    path = write_gguf(
        tmp_path / "m.gguf", source.hf, source.tokenizer, tokenizer__ggml__model="llama",
        tokenizer__ggml__pre="default", tokenizer__ggml__merges=None,
        tokenizer__ggml__scores=[rank.get(t, -1e6) for t in tokens],
        tokenizer__ggml__token_type=kinds,
    )  # fmt: skip
    loaded = load_model(path, dtype="fp32", device_map="cpu")
    lines = (shared_data / "wikitext2_test.txt").read_text().split("\n")[:60]
    texts = ["Once upon a time, there was a little girl named Lily.", *filter(None, lines)]
    assert token_ids(loaded.tokenizer, texts) == token_ids(source.tokenizer, texts)
    assert loaded.tokenizer(texts[0])["input_ids"] == source.tokenizer(texts[0])["input_ids"]
    ids = source.tokenizer(texts[0])["input_ids"]
    assert torch.equal(logits(loaded, ids), logits(source, ids))


def test_collect_and_its_record(bpe, small, tmp_path):
    path = write_gguf(tmp_path / "m.GGUF", made(bpe, max_position_embeddings=512), bpe, kind="Q8_0")
    flags = [*small, "--model_path", path, "--output_dir", tmp_path, "--validate_samples", 4]
    result = command_line("collect", *flags)
    meta = json.loads((result.run_dir / "meta.json").read_text())
    assert meta["validated_against_hf"] < 1e-4
    assert meta["model"]["source"] == str(path)
    import hashlib

    assert meta["model"]["gguf"] == {
        "file": "m.GGUF",
        "quantization": {"Q8_0": 23, "F32": 7},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_the_file_is_not_held_open_or_changed(bpe, ids, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", made(bpe), bpe)
    before = path.read_bytes()
    loaded = load_model(path, dtype="fp32", device_map="cpu")
    first = logits(loaded, ids)
    assert path.read_bytes() == before
    path.write_bytes(bytes(len(before)))
    assert torch.equal(logits(loaded, ids), first)


def test_without_the_package_one_line_says_so(bpe, tmp_path, monkeypatch, run_cli):
    path = write_gguf(tmp_path / "m.gguf", made(bpe), bpe)
    monkeypatch.setitem(sys.modules, "gguf", None)
    rest = ["--dataset", "builtin:questions", "--output_dir", tmp_path / "runs"]
    result = run_cli("collect", "--model_path", path, *rest)
    assert result.code == 2
    assert "pip install 'tl-headnorm[gguf]'" in result.error_line


def test_sizes_of_the_fixture_differ():
    assert len(set(BLOCKS.values())) == len(BLOCKS)
    assert set(SIZES) == set(BLOCKS)
    assert set(tensors_of(llama(**BLOCKS), "llama")) >= {"blk.2.attn_output.weight"}
    assert gguf.MODEL_ARCH_NAMES
