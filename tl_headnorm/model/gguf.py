"""GGUF files: their tensors dequantised, once, into an ordinary Hugging Face model.

The weights are those of the quantised file, not the original's, in `--dtype`; the model's record
says so (`record`). Values are dequantised by the package `gguf`; the tokenizer is made by
transformers of the file alone. What transformers' own loader leaves out is read here, since it
changes what the model computes: RoPE scaling (`rope_freqs.weight` of LLaMA 3.1 and later, linear
scaling), and how text is split before the merges of SmolLM's tokenizer. A file that has any
tensor this module does not place, or lacks one, is refused.
"""

import hashlib
import logging
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.model.gguf_header import Header, TensorInfo, read_header, refuse

# GGUF's architecture -> transformers' class.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# llama.cpp's names of ways to split text before BPE that the tokenizer is built for.
KNOWN_SPLITS = ("gpt-2", "smollm", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen")
ROPE_FACTORS = "rope_freqs.weight"
# LLaMA 3's, which llama.cpp's converter assumes: low and high frequency factor, first context.
LLAMA3_ROPE = (1.0, 4.0, 8192)


def load_gguf(
    source: str, dtype: torch.dtype, device_map: str | dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer of a GGUF file. Raises InputError in one line."""
    import transformers

    header = read_header(_existing(source))
    config = config_of(header)
    names = tensor_names(header, config)
    tokenizer = load_tokenizer(header, config.vocab_size)
    state = {name: read_tensor(header, tensor, dtype) for name, tensor in names.items()}
    if header.architecture == "llama":
        for name in state:
            if "q_proj" in name or "k_proj" in name:
                heads = (
                    config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                )
                state[name] = halves_paired(state[name], heads)
    spread = {} if device_map is None else {"device_map": device_map}
    model, report = getattr(transformers, ARCHITECTURES[header.architecture]).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **spread
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        refuse(header.path, "the tensors of its architecture", f"others ({wrong[0]})")
    model.config.name_or_path = source
    return model, tokenizer


def record(source: str) -> dict[str, Any]:
    """The file's entry in meta.json: name, number of tensors of each type, SHA-256."""
    path = _existing(source)
    types = Counter(tensor.type_name for tensor in read_header(path).tensors.values())
    return {
        "file": path.name,
        "quantization": dict(types.most_common()),
        "sha256": sha256_of(path),
    }


def sha256_of(path: Path) -> str:
    """A file's digest, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"model_path: expected a GGUF file, found nothing at {source}; check the path"
        )
    return path


class _Keys:
    """The metadata of a header's architecture, typed."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def get(self, name: str, default: Any = None) -> Any:
        return self.header.fields.get(f"{self.header.architecture}.{name}", default)

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        found = self.get(name, default)
        if type(found) is not int or not 1 <= found < 1 << 31:
            self.refuse(name, "a whole number above 0", found)
        return int(found)

    def number(self, name: str, default: float | None = None) -> float:
        found = self.get(name, default)
        if type(found) not in (int, float) or not 0 < found < math.inf:
            self.refuse(name, "a number above 0", found)
        return float(found)

    def refuse(self, name: str, expected: str, found: Any) -> None:
        key = f"{self.header.architecture}.{name}"
        short = "none" if found is None else f"{found!r}"[:80]
        refuse(self.header.path, f"{expected} for {key}", short)


def config_of(header: Header) -> Any:
    """Hugging Face's config, from the metadata alone."""
    from transformers import AutoConfig

    if header.architecture not in ARCHITECTURES:
        refuse(
            header.path, f"an architecture among {', '.join(ARCHITECTURES)}",
            header.architecture[:80],
            "load the model it was made from, in Hugging Face format",
        )  # fmt: skip
    if "split.count" in header.fields and header.fields["split.count"] != 1:
        refuse(
            header.path, "all of a model", "one part of several", "join them with llama-gguf-split"
        )
    keys = _Keys(header)
    heads, width = keys.size("attention.head_count"), keys.size("embedding_length")
    rotary = keys.size("rope.dimension_count", max(width // heads, 1))
    d_head = keys.size("attention.key_length", rotary)
    if keys.size("attention.value_length", d_head) != d_head or rotary != d_head or d_head % 2:
        keys.refuse("rope.dimension_count", f"keys, values and RoPE of {d_head} wide", rotary)
    embedding = header.tensors.get("token_embd.weight")
    config = AutoConfig.for_model(
        header.architecture,
        architectures=[ARCHITECTURES[header.architecture]],
        vocab_size=embedding.shape[0] if embedding else 1,
        hidden_size=width,
        intermediate_size=keys.size("feed_forward_length"),
        num_hidden_layers=keys.size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=keys.size("attention.head_count_kv", heads),
        head_dim=d_head,
        max_position_embeddings=keys.size("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope_parameters(header, keys, d_head),
        tie_word_embeddings="output.weight" not in header.tensors,
        **{f"{name}_token_id": _token_id(header, key) for name, key in SPECIAL.items()},
    )
    if config.num_attention_heads % config.num_key_value_heads:
        keys.refuse("attention.head_count_kv", f"a divisor of {heads} heads", "another number")
    return config


SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _token_id(header: Header, name: str) -> int | None:
    found = header.fields.get(f"tokenizer.ggml.{name}_token_id")
    n_tokens = len(header.fields.get("tokenizer.ggml.tokens", ()))
    if found is not None and (type(found) is not int or not 0 <= found < n_tokens):
        refuse(header.path, f"a {name} token among its {n_tokens}", repr(found)[:80])
    return found


def rope_parameters(header: Header, keys: _Keys, d_head: int) -> dict[str, Any]:
    """Base and scaling of the rotary embedding.

    llama.cpp stores LLaMA 3's scaling as the factors by which it divides the frequencies; they
    are accepted where LLaMA 3's formula gives them.
    """
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    kind = keys.get("rope.scaling.type", "none")
    if kind == "linear" or (keys.get("rope.scale_linear") or 1) != 1:
        factor = keys.number("rope.scaling.factor", keys.get("rope.scale_linear"))
        rope.update(rope_type="linear", factor=factor)
    elif kind != "none":
        keys.refuse("rope.scaling.type", "RoPE scaling none or linear", kind)
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return rope
    factors = read_tensor(header, tensor, torch.float64).numpy()
    low, high, context = LLAMA3_ROPE
    rope.update(
        rope_type="llama3", factor=float(factors.max()), low_freq_factor=low,
        high_freq_factor=high, original_max_position_embeddings=context,
    )  # fmt: skip
    if kind != "none" or not np.allclose(factors, llama3_factors(rope, d_head), rtol=1e-4):
        refuse(
            header.path, f"LLaMA 3's RoPE scaling in {ROPE_FACTORS}", "another",
            "load the model it was made from, in Hugging Face format",
        )  # fmt: skip
    return rope


def llama3_factors(rope: dict[str, Any], d_head: int) -> np.ndarray:
    """LLaMA 3's divisor of each of the d_head / 2 rotary frequencies."""
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, d_head, 2) / d_head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    smooth = np.clip((context / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def tensor_names(header: Header, config: Any) -> dict[str, TensorInfo]:
    """Hugging Face's name of every tensor -> where it lies. Raises InputError for any misfit.

    The layers are counted before anything is made of that number.
    """
    n_layers = config.num_hidden_layers
    if n_layers > len(header.tensors):
        refuse(header.path, f"tensors of {n_layers} layers", f"{len(header.tensors)} tensors")
    wanted = {
        "token_embd.weight": ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)),
        "output_norm.weight": ("model.norm.weight", (config.hidden_size,)),
    }
    if not config.tie_word_embeddings:
        wanted["output.weight"] = ("lm_head.weight", wanted["token_embd.weight"][1])
    for layer in range(n_layers):
        for ours, (theirs, shape) in _block_names(header.architecture, config).items():
            wanted[f"blk.{layer}.{ours}"] = (f"model.layers.{layer}.{theirs}", shape)
    present = set(header.tensors) - {ROPE_FACTORS}
    for what, names in (("missing", wanted.keys() - present), ("more", present - wanted.keys())):
        if names:
            refuse(
                header.path, f"the tensors of a {header.architecture} of {n_layers} layers",
                f"{len(names)} {what} ({min(names)[:80]})",
            )  # fmt: skip
    for name, (_, shape) in wanted.items():
        if header.tensors[name].shape != shape:
            refuse(header.path, f"{name} of shape {shape}", header.tensors[name].shape)
    return {theirs: header.tensors[ours] for ours, (theirs, _) in wanted.items()}


def _block_names(architecture: str, config: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A layer's tensors: GGUF's name -> Hugging Face's, and the shape."""
    width, inner, d_head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (width,)),
        "attn_output.weight": ("self_attn.o_proj.weight", (width, q)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (width,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, width)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, width)),
        "ffn_down.weight": ("mlp.down_proj.weight", (width, inner)),
    }
    for letter, rows in (("q", q), ("k", kv), ("v", kv)):
        names[f"attn_{letter}.weight"] = (f"self_attn.{letter}_proj.weight", (rows, width))
        if architecture == "qwen2":
            names[f"attn_{letter}.bias"] = (f"self_attn.{letter}_proj.bias", (rows,))
    if architecture == "qwen3":
        for letter in "qk":
            names[f"attn_{letter}_norm.weight"] = (f"self_attn.{letter}_norm.weight", (d_head,))
    return names


def read_tensor(header: Header, tensor: TensorInfo, dtype: torch.dtype) -> Tensor:
    """A tensor's values in `dtype`; a quantised one is dequantised in float32 first."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    n_rows = math.prod(tensor.shape[:-1])
    with header.path.open("rb") as file:
        raw = np.fromfile(file, np.uint8, tensor.n_bytes, offset=tensor.offset)
    if raw.size != tensor.n_bytes:
        refuse(header.path, f"all of {tensor.name}", "an end before it (it has changed)")
    values = dequantize(raw.reshape(n_rows, -1), GGMLQuantizationType[tensor.type_name])
    return torch.from_numpy(values.reshape(tensor.shape)).to(dtype)


def halves_paired(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of W_Q or W_K [n_heads * d_head, d_model] in Hugging Face's order.

    llama.cpp rotates neighbours (0, 1), (2, 3), ... in LLaMA, Hugging Face the halves: row 2i + j
    of a head becomes row j * d_head / 2 + i.
    """
    neighbours = weight.view(n_heads, -1, 2, weight.shape[-1])
    return neighbours.transpose(1, 2).reshape(weight.shape).contiguous()


def load_tokenizer(header: Header, n_rows: int) -> Any:
    """The tokenizer of the file, made by transformers, splitting text as llama.cpp does."""
    from transformers import PreTrainedTokenizerFast

    tokens = header.fields.get("tokenizer.ggml.tokens")
    kind = header.fields.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or kind not in ("gpt2", "llama"):
        refuse(
            header.path, "a tokenizer of kind gpt2 or llama",
            "none" if kind is None else f"{kind!r}"[:80],
            "load the model it was made from, in Hugging Face format",
        )  # fmt: skip
    if len(tokens) != n_rows:
        refuse(header.path, f"{n_rows} tokens, as rows of the embedding", len(tokens))
    merges = header.fields.get("tokenizer.ggml.merges", [])
    odd = [m for m in merges if m.count(" ") != 1] if isinstance(merges, list) else [merges]
    if odd:
        refuse(header.path, "merges of two pieces each", f"{odd[0]!r}"[:80])
    # A folder of its own: files beside the GGUF file must not be taken for its tokenizer's.
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(header.path.resolve(), Path(folder) / "model.gguf")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                folder, gguf_file="model.gguf", local_files_only=True
            )
        except Exception as error:  # transformers raises of every kind on a damaged vocabulary
            raise InputError(
                f"model_path: the tokenizer of {header.path.name} could not be read: "
                f"{first_line(error)}; the file is damaged: get it anew"
            ) from error
    if kind == "gpt2":
        _split_as_llama_cpp(tokenizer, str(header.fields.get("tokenizer.ggml.pre", "default")))
    else:
        _prefix_as_llama_cpp(tokenizer, header.fields.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.name_or_path = str(header.path)
    return tokenizer


def _split_as_llama_cpp(tokenizer: Any, split: str) -> None:
    """SmolLM's digits are split off one by one, before all else; transformers does not know."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if split == "smollm":
        parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    elif split not in KNOWN_SPLITS:
        logging.getLogger("tl_headnorm").warning(
            "tokenizer: text is split as GPT-2's is before merging, since the file's way (%s) is "
            "not known; rare prompts may get other tokens than in training",
            split[:80],
        )


def _prefix_as_llama_cpp(tokenizer: Any, add_prefix: bool) -> None:
    """SentencePiece puts a space before every text, also before one that begins with a space."""
    from tokenizers.normalizers import Prepend, Replace, Sequence

    spaces = Replace(" ", "▁")
    tokenizer.backend_tokenizer.normalizer = (
        Sequence([Prepend("▁"), spaces]) if add_prefix else spaces
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
