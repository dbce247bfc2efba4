"""GGUF files that are damaged, of another kind, or lie about themselves: one clear line each."""

import contextlib
import random
import shutil
import struct
import tracemalloc

import pytest
import torch
from gguf_files import entry, packed, raw_gguf, text, write_gguf
from hostile import Cases

from tl_headnorm.errors import InputError
from tl_headnorm.model.gguf_header import read_header
from tl_headnorm.model.pretrained import load_pretrained

case = Cases()
ARCH = ("general.architecture", "llama")
SIZES = [
    ARCH, ("llama.block_count", 1), ("llama.context_length", 64), ("llama.embedding_length", 8),
    ("llama.feed_forward_length", 12), ("llama.attention.head_count", 2),
    ("llama.attention.head_count_kv", 1), ("llama.attention.layer_norm_rms_epsilon", 1e-5),
    ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.tokens", ["a", "b", "c"]),
    ("tokenizer.ggml.merges", ["a b"]),
]  # fmt: skip
SHAPES = {"token_embd.weight": (8, 3), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
          "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (8, 4),
          "blk.0.attn_v.weight": (8, 4),
          "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,),
          "blk.0.ffn_gate.weight": (8, 12), "blk.0.ffn_up.weight": (8, 12),
          "blk.0.ffn_down.weight": (12, 8)}  # fmt: skip


def small_gguf(folder, *, shapes=(), tail=0, **changes):
    """A well-formed file of 11 tensors with keys or shapes changed; None takes one out."""
    fields = dict(SIZES) | {k.replace("__", "."): v for k, v in changes.items()}
    offset, entries = 0, []
    for name, dims in {**SHAPES, **dict(shapes)}.items():
        if dims is not None:
            entries.append(entry(name, dims, offset=offset))
            size = 4
            for n in dims:
                size *= n
            offset += -(-size // 32) * 32
    pairs = [(k, v) for k, v in fields.items() if v is not None]
    data = struct.pack("<f", 0.1) * (offset // 4)
    return raw_gguf(folder / "m.gguf", pairs, entries, data=data[: len(data) - tail])


def raw(folder, *args, **kwargs):
    return {"model_path": raw_gguf(folder / "m.gguf", *args, **kwargs)}


def changed(folder, **kwargs):
    return {"model_path": small_gguf(folder, **kwargs)}


@case("model_path: expected a GGUF file, found nothing at ", "none.gguf; check the path")
def missing_file(folder, model):
    return {"model_path": folder / "none.gguf"}


@case("model_path: expected a GGUF file, found nothing at ")
def a_folder(folder, model):
    (folder / "m.gguf").mkdir()
    return {"model_path": folder / "m.gguf"}


@case("found no config.json in ", "; give its GGUF file: --model_path ", "m.gguf")
def the_folder_around_it(folder, model):
    small_gguf(folder)
    return {"model_path": folder}


@case("expected the four bytes GGUF at its beginning in m.gguf, found others")
def empty_file(folder, model):
    (folder / "m.gguf").write_bytes(b"")
    return {"model_path": folder / "m.gguf"}


@case("expected the four bytes GGUF at its beginning in m.gguf, found others")
def safetensors_by_another_name(folder, model):
    shutil.copy(model / "model.safetensors", folder / "m.gguf")
    return {"model_path": folder / "m.gguf"}


@case("found an end at 4 (a truncated file)")
def magic_alone(folder, model):
    (folder / "m.gguf").write_bytes(b"GGUF")
    return {"model_path": folder / "m.gguf"}


@case("found an end at 4 (a truncated file)")
def magic_alone_by_another_name(folder, model):
    (folder / "weights").write_bytes(b"GGUF")
    return {"model_path": folder / "weights"}


@case("expected GGUF of version 2 or 3 in m.gguf, found version 1;")
def version_1(folder, model):
    return raw(folder, [ARCH], version=1)


@case("expected GGUF of version 2 or 3 in m.gguf, found version 50331648;", "little-endian")
def big_endian(folder, model):
    return raw(folder, [ARCH], version=3 << 24)


@case("tensors in m.gguf, found a count of 1152921504606846976")
def huge_number_of_tensors(folder, model):
    return raw(folder, [ARCH], n_tensors=1 << 60)


@case("keys in m.gguf, found a count of 18446744073709551615")
def huge_number_of_keys(folder, model):
    return raw(folder, [ARCH], n_fields=(1 << 64) - 1)


@case("expected a text of at most 65536 bytes in m.gguf, found a length of 1099511627776")
def huge_name(folder, model):
    return raw(folder, [], [struct.pack("<Q", 1 << 40)], n_fields=1, n_tensors=0, data=bytes(64))


@case("(a truncated file)")
def text_past_the_end(folder, model):
    return raw(folder, [("general.name", struct.pack("<IQ", 8, 60_000)), ARCH])


@case("expected at most ", "texts in tokenizer.ggml.tokens in m.gguf, found a count of 4294967296")
def huge_list_of_texts(folder, model):
    return raw(folder, [ARCH, ("tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 1 << 32))])


@case("values in x in m.gguf, found a count of 9223372036854775808")
def huge_list_of_numbers(folder, model):
    return raw(folder, [ARCH, ("x", struct.pack("<IIQ", 9, 10, 1 << 63))])


@case("expected texts or numbers in the list x in m.gguf, found type 9")
def nested_lists(folder, model):
    return raw(folder, [ARCH, ("x", struct.pack("<IIQ", 9, 9, 1) * 200)])


@case("expected a known type of value for x in m.gguf, found type 77")
def unknown_type_of_value(folder, model):
    return raw(folder, [ARCH, ("x", struct.pack("<II", 77, 0))])


@case("expected keys with names of their own in m.gguf, found 'general.architecture' twice")
def a_key_twice(folder, model):
    return raw(folder, [ARCH, ARCH])


@case("expected UTF-8 before byte", "found other bytes")
def no_utf_8(folder, model):
    return raw(folder, [ARCH, ("general.name", packed("x")[:4] + text(b"\xff\xfe"))])


@case("expected the key general.architecture in m.gguf, found none")
def no_architecture(folder, model):
    return changed(folder, general__architecture=None)


@case("expected an architecture among llama, qwen2, qwen3 in m.gguf, found mamba; load the model")
def another_architecture(folder, model):
    return changed(folder, general__architecture="mamba")


@case("(a truncated file); get it anew")
def truncated_data(folder, model):
    return changed(folder, tail=1)


@case("(a truncated file)")
def truncated_header(folder, model):
    path = small_gguf(folder)
    path.write_bytes(path.read_bytes()[:-1600])
    return {"model_path": path}


@case("expected a type of tensor that the package gguf dequantises for t in m.gguf, found type 999")
def unknown_type_of_tensor(folder, model):
    return raw(folder, [ARCH], [entry("t", (32, 1), kind=999)], data=bytes(64))


@case("expected rows of full blocks of 32 in t in m.gguf, found sizes (33, 2)")
def rows_that_are_no_blocks(folder, model):
    return raw(folder, [ARCH], [entry("t", (33, 2), kind=3)], data=bytes(64))


@case("expected t up to byte", "(a truncated file)")
def a_place_past_the_end(folder, model):
    return raw(folder, [ARCH], [entry("t", (8,), offset=1 << 50)], data=bytes(64))


@case("expected t up to byte", "(a truncated file)")
def huge_dimensions(folder, model):
    return raw(folder, [ARCH], [entry("t", (1 << 62, 1 << 62, 1 << 62))], data=bytes(64))


@case("expected u in a place of its own in m.gguf, found an overlap")
def tensors_over_each_other(folder, model):
    return raw(folder, [ARCH], [entry("t", (8,)), entry("u", (8,), offset=8)], data=bytes(64))


@case("expected 1 to 4 dimensions of t in m.gguf, found 4000000000")
def too_many_dimensions(folder, model):
    return raw(folder, [ARCH], [text("t") + struct.pack("<I", 4_000_000_000)], data=bytes(64))


@case("expected rows of full blocks of 1 in t in m.gguf, found sizes (0, 8)")
def no_rows(folder, model):
    return raw(folder, [ARCH], [entry("t", (0, 8))], data=bytes(64))


@case("expected an alignment from 1 to 65536 in m.gguf, found 0")
def alignment_of_nothing(folder, model):
    return changed(folder, general__alignment=0)


@case("expected tensors of 2000000000 layers in m.gguf, found 11 tensors")
def two_billion_layers(folder, model):
    return changed(folder, llama__block_count=2_000_000_000)


@case("expected token_embd.weight of shape (3, 1000000000) in m.gguf, found (3, 8)")
def a_billion_wide(folder, model):
    return changed(folder, llama__embedding_length=1_000_000_000, llama__rope__dimension_count=4)


@case(
    "expected the tensors of a llama of 1 layers in m.gguf, found 1 missing (blk.0.attn_v.weight)"
)
def missing_tensor(folder, model):
    return changed(folder, shapes={"blk.0.attn_v.weight": None})


@case("expected the tensors of a llama of 1 layers in m.gguf, found 1 more (blk.0.attn_q.bias)")
def a_bias_that_would_not_run(folder, model):
    return changed(folder, shapes={"blk.0.attn_q.bias": (8,)})


@case("expected blk.0.attn_output.weight of shape (8, 8) in m.gguf, found (4, 8)")
def another_shape(folder, model):
    return changed(folder, shapes={"blk.0.attn_output.weight": (8, 4)})


@case("expected a whole number above 0 for llama.attention.head_count in m.gguf, found 0")
def no_heads(folder, model):
    return changed(folder, llama__attention__head_count=0)


@case("expected a whole number above 0 for llama.context_length in m.gguf, found none")
def no_context(folder, model):
    return changed(folder, llama__context_length=None)


@case("expected a whole number above 0 for llama.attention.head_count_kv in m.gguf, found [1, 2]")
def heads_per_layer(folder, model):
    return changed(folder, llama__attention__head_count_kv=[1, 2])


@case("expected a number above 0 for llama.attention.layer_norm_rms_epsilon in m.gguf, found 'x'")
def an_epsilon_in_words(folder, model):
    return changed(folder, llama__attention__layer_norm_rms_epsilon="x")


@case("expected RoPE scaling none or linear for llama.rope.scaling.type in m.gguf, found 'yarn'")
def yarn(folder, model):
    return changed(folder, llama__rope__scaling__type="yarn")


@case("expected LLaMA 3's RoPE scaling in rope_freqs.weight in m.gguf, found another")
def other_rope_factors(folder, model):
    return changed(folder, shapes={"rope_freqs.weight": (2,)})


@case("expected all of a model in m.gguf, found one part of several; join them")
def one_part_of_several(folder, model):
    return changed(folder, split__count=4)


@case("expected a tokenizer of kind gpt2 or llama in m.gguf, found none")
def no_tokenizer(folder, model):
    return changed(folder, tokenizer__ggml__model=None, tokenizer__ggml__tokens=None)


@case("expected a tokenizer of kind gpt2 or llama in m.gguf, found 'bert'")
def another_tokenizer(folder, model):
    return changed(folder, tokenizer__ggml__model="bert")


@case("expected 3 tokens, as rows of the embedding in m.gguf, found 2")
def fewer_tokens_than_rows(folder, model):
    return changed(folder, tokenizer__ggml__tokens=["a", "b"])


@case("the tokenizer of m.gguf could not be read: ")
def merges_of_unknown_tokens(folder, model):
    return changed(folder, tokenizer__ggml__merges=["x y"])


@case("expected merges of two pieces each in m.gguf, found 'nonsense'")
def a_merge_of_one_piece(folder, model):
    return changed(folder, tokenizer__ggml__merges=["a b", "nonsense"])


@case("expected a bos token among its 3 in m.gguf, found 99")
def bos_out_of_range(folder, model):
    return changed(folder, tokenizer__ggml__bos_token_id=99)


@pytest.mark.parametrize("name", case)
def test_one_line(name, run_cli, flags, llama_dir, tmp_path):
    case.check(name, run_cli, flags, tmp_path, llama_dir)


def test_there_are_enough_of_them():
    assert len(case) >= 20


def test_nan_weights_are_found_by_the_self_check(flags, bpe, run_cli, tmp_path):
    import numpy as np
    from handmade import llama

    model = llama(vocab_size=len(bpe), max_position_embeddings=512)
    broken = np.full(model.config.hidden_size, np.nan, np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, bpe, tensors={"blk.1.attn_norm.weight": broken})
    result = run_cli("collect", *flags({"model_path": path}))
    assert result.code == 2
    assert "expected finite numbers, found NaN" in result.err


@pytest.mark.parametrize("name", case)
def test_headers_take_little_memory(name, llama_dir, tmp_path):
    path = case[name][0](tmp_path, llama_dir)["model_path"]
    tracemalloc.start()
    try:
        with pytest.raises((InputError, IsADirectoryError)):
            load_pretrained(str(path), torch.float32, False, None)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_any_flipped_byte_of_the_header_is_one_line_or_harmless(tmp_path):
    whole = small_gguf(tmp_path).read_bytes()
    header = len(whole) - sum(4 * 8 for _ in SHAPES)
    rng = random.Random(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(4, header)] = rng.choice((0, 1, 255, rng.randrange(256)))
        (tmp_path / "m.gguf").write_bytes(damaged)
        with contextlib.suppress(InputError):
            read_header(tmp_path / "m.gguf")
