"""GGUF files made by the tests: with the gguf package's writer, and byte by byte."""

import json
import struct

import gguf
import numpy as np
import torch

KINDS = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
         str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL}  # fmt: skip


def neighbours_paired(weight, n_heads):
    """Rows of W_Q or W_K as llama.cpp's LLaMA files have them: rotated pairs side by side."""
    d_head = len(weight) // n_heads
    order = [
        head * d_head + half * (d_head // 2) + i
        for head in range(n_heads)
        for i in range(d_head // 2)
        for half in (0, 1)
    ]
    return weight[order]


def metadata(config, tokenizer, architecture):
    """Keys of a model and of its byte-level BPE tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    return {
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }


def tensors_of(model, architecture):
    """GGUF's tensor names (by the package's own table) and values in llama.cpp's layout."""
    config = model.config
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture),
        config.num_hidden_layers,
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            value = neighbours_paired(value, heads[part])
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value.numpy()
    return found


def write_gguf(path, model, tokenizer, *, architecture="llama", kind="F32", tensors=None, **keys):
    """Write a Hugging Face model as a GGUF file; matrices in the quantisation `kind`.

    `tensors` are put beside or over the model's, None takes one out; likewise `keys`, whose
    dots are written as two underscores.
    """
    changed = {key.replace("__", "."): value for key, value in keys.items()}
    fields = {**metadata(model.config, tokenizer, architecture), **changed}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, KINDS[type(value)])
    for name, value in {**tensors_of(model, architecture), **(tensors or {})}.items():
        if value is None:
            continue
        wanted = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(np.ascontiguousarray(value, np.float32), wanted)
        writer.add_tensor(name, packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model, kind):
    """The model with every matrix quantised and dequantised by the gguf package, in place."""
    wanted = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                packed = gguf.quants.quantize(parameter.float().numpy(), wanted)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, wanted)))
    return model


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def packed(value):
    """A metadata value with its type; bytes are taken as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return struct.pack("<II", 4, value)


def entry(name, dims, kind=0, offset=0):
    """A tensor's entry in the header."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw_gguf(path, fields, tensors=(), *, version=3, n_tensors=None, n_fields=None, data=b""):
    """A GGUF file byte by byte: pairs of key and value, and ready entries of tensors."""
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(fields) if n_fields is None else n_fields,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(text(key) + packed(value) for key, value in fields) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path
