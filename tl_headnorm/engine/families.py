"""How each Hugging Face architecture becomes a HookedTransformer: its config and its weights.

Weights are views of the Hugging Face tensors (einops.rearrange and .T copy nothing):
TransformerLens brings every weight back to Hugging Face's layout at each call, which is free for
such a view.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tl_headnorm.engine.short_blocks import install
from tl_headnorm.errors import InputError

StateDict = dict[str, Tensor]


class Unsupported(InputError):
    """HookedTransformer would compute something else than this model; the bridge may do."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(
            f"model: expected {expected}, found {found}, which HookedTransformer does not "
            "compute; use --engine bridge"
        )


@dataclass(frozen=True)
class Family:
    """`config(hf_config)` gives HookedTransformerConfig's fields, `weights(hf_model)` its state."""

    config: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any], StateDict]


def rope_fields(hf_config: Any) -> dict[str, Any]:
    """Rotary base and scaling; kinds HookedTransformer cannot compute are refused."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    fields: dict[str, Any] = {"rotary_base": rope.get("rope_theta", 10000.0)}
    if kind == "linear":
        fields["rotary_scaling_factor"] = rope["factor"]
    elif kind == "llama3":
        fields.update(
            use_NTK_by_parts_rope=True,
            NTK_by_parts_factor=rope["factor"],
            NTK_by_parts_low_freq_factor=rope["low_freq_factor"],
            NTK_by_parts_high_freq_factor=rope["high_freq_factor"],
            NTK_original_ctx_len=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise Unsupported("RoPE scaling default, linear or llama3", repr(kind))
    return fields


def context_length(hf_config: Any) -> int:
    """The longest prompt for which every layer attends to all of it.

    A prompt that is no longer than the sliding window never feels it; the attention computed
    here is global, so a longer one is refused.
    """
    window = getattr(hf_config, "sliding_window", None)
    types = getattr(hf_config, "layer_types", None)
    longest = int(hf_config.max_position_embeddings)
    if window is not None and (types is None or "sliding_attention" in types):
        longest = min(int(window), longest)
    if longest < 2:
        raise InputError(
            f"model_path: expected a model that takes prompts of 2 tokens or more, found {longest} "
            "in config.json (max_position_embeddings, sliding_window); mend it"
        )
    return longest


def _common(hf_config: Any) -> dict[str, Any]:
    """Sizes every family spells alike (GPT-2's config maps its own names to these)."""
    return {
        "d_model": hf_config.hidden_size,
        "n_heads": hf_config.num_attention_heads,
        "n_layers": hf_config.num_hidden_layers,
        "n_ctx": context_length(hf_config),
        "d_vocab": hf_config.vocab_size,
    }


def llama_config(hf_config: Any) -> dict[str, Any]:
    """HookedTransformerConfig fields of LLaMA, Mistral and Qwen, read from the model's config."""
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    d_head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    return {
        **_common(hf_config),
        "d_head": d_head,
        "n_key_value_heads": kv_heads if kv_heads != heads else None,
        "d_mlp": hf_config.intermediate_size,
        "eps": hf_config.rms_norm_eps,
        "act_fn": hf_config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_adjacent_pairs": False,
        **rope_fields(hf_config),
    }


def split_heads(
    weight: Tensor, bias: Tensor | None, n_heads: int, names: tuple[str, str]
) -> StateDict:
    """W [head, d_model, d_head] and b [head, d_head] of a q, k or v projection, as views."""
    state = {names[0]: rearrange(weight, "(h d) m -> h m d", h=n_heads)}
    if bias is not None:
        state[names[1]] = rearrange(bias, "(h d) -> h d", h=n_heads)
    return state


def _linear_heads(linear: Any, n_heads: int, names: tuple[str, str]) -> StateDict:
    return split_heads(linear.weight, linear.bias, n_heads, names)


def llama_weights(hf_model: Any) -> StateDict:
    """HookedTransformer's parameter names to views of the tensors of LLaMA, Mistral or Qwen."""
    config = hf_model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    mark = "_" if kv_heads != heads else ""  # grouped keys and values: stored ungrouped as _W_K
    state = {
        "embed.W_E": hf_model.model.embed_tokens.weight,
        "ln_final.w": hf_model.model.norm.weight,
        "unembed.W_U": hf_model.lm_head.weight.T,
    }
    for layer, block in enumerate(hf_model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        parts: StateDict = {
            "ln1.w": block.input_layernorm.weight,
            "ln2.w": block.post_attention_layernorm.weight,
            "attn.W_O": rearrange(attention.o_proj.weight, "m (h d) -> h d m", h=heads),
            "mlp.W_gate": mlp.gate_proj.weight.T,
            "mlp.W_in": mlp.up_proj.weight.T,
            "mlp.W_out": mlp.down_proj.weight.T,
        }
        parts |= _linear_heads(attention.q_proj, heads, ("attn.W_Q", "attn.b_Q"))
        parts |= _linear_heads(attention.k_proj, kv_heads, (f"attn.{mark}W_K", f"attn.{mark}b_K"))
        parts |= _linear_heads(attention.v_proj, kv_heads, (f"attn.{mark}W_V", f"attn.{mark}b_V"))
        if attention.o_proj.bias is not None:
            parts["attn.b_O"] = attention.o_proj.bias
        for norm in ("q_norm", "k_norm"):  # Qwen3
            if hasattr(attention, norm):
                parts[f"attn.{norm}.w"] = getattr(attention, norm).weight
        _refuse_mlp_bias(mlp)
        state |= {f"blocks.{layer}.{name}": tensor for name, tensor in parts.items()}
    return state


def _refuse_mlp_bias(mlp: Any) -> None:
    """HookedTransformer has no bias inside the gate, so such a model would come out wrong."""
    if any(layer.bias is not None for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise Unsupported("mlp_bias false", "biases in the gated MLP")


def gpt2_config(hf_config: Any) -> dict[str, Any]:
    return {
        **_common(hf_config),
        "d_head": hf_config.hidden_size // hf_config.num_attention_heads,
        "d_mlp": hf_config.n_inner or 4 * hf_config.hidden_size,
        "eps": hf_config.layer_norm_epsilon,
        "act_fn": hf_config.activation_function,
        "use_attn_scale": hf_config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf_config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def gpt2_weights(hf_model: Any) -> StateDict:
    """GPT-2's tensors; the attention's are laid out once more, the MLP's are views.

    Its Conv1D holds weights as [in, out], which is the MLP's layout here but not the
    attention's: a view of it would be copied at every call.
    """
    heads, body = hf_model.config.num_attention_heads, hf_model.transformer
    state = {
        "embed.W_E": body.wte.weight,
        "pos_embed.W_pos": body.wpe.weight,
        "ln_final.w": body.ln_f.weight,
        "ln_final.b": body.ln_f.bias,
        "unembed.W_U": hf_model.lm_head.weight.T,
    }
    for layer, block in enumerate(body.h):
        qkv = block.attn.c_attn.weight.T.contiguous().chunk(3)
        biases = block.attn.c_attn.bias.chunk(3)
        out = block.attn.c_proj.weight.T.contiguous()
        parts: StateDict = {
            "ln1.w": block.ln_1.weight,
            "ln1.b": block.ln_1.bias,
            "ln2.w": block.ln_2.weight,
            "ln2.b": block.ln_2.bias,
            "attn.W_O": rearrange(out, "m (h d) -> h d m", h=heads),
            "attn.b_O": block.attn.c_proj.bias,
            "mlp.W_in": block.mlp.c_fc.weight,
            "mlp.b_in": block.mlp.c_fc.bias,
            "mlp.W_out": block.mlp.c_proj.weight,
            "mlp.b_out": block.mlp.c_proj.bias,
        }
        for letter, weight, bias in zip("QKV", qkv, biases, strict=True):
            parts |= split_heads(weight, bias, heads, (f"attn.W_{letter}", f"attn.b_{letter}"))
        state |= {f"blocks.{layer}.{name}": tensor for name, tensor in parts.items()}
    return state


def neox_config(hf_config: Any) -> dict[str, Any]:
    d_head = hf_config.hidden_size // hf_config.num_attention_heads
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    return {
        **_common(hf_config),
        "d_head": d_head,
        "d_mlp": hf_config.intermediate_size,
        "eps": hf_config.layer_norm_eps,
        "act_fn": hf_config.hidden_act,
        "normalization_type": "LN",
        "parallel_attn_mlp": hf_config.use_parallel_residual,
        "positional_embedding_type": "rotary",
        "rotary_dim": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rotary_adjacent_pairs": False,
        **rope_fields(hf_config),
    }


def neox_weights(hf_model: Any) -> StateDict:
    """GPT-NeoX's tensors; q, k and v, stored in turns head by head, are laid out once more."""
    heads, body = hf_model.config.num_attention_heads, hf_model.gpt_neox
    state = {
        "embed.W_E": body.embed_in.weight,
        "ln_final.w": body.final_layer_norm.weight,
        "ln_final.b": body.final_layer_norm.bias,
        "unembed.W_U": hf_model.get_output_embeddings().weight.T,
    }
    for layer, block in enumerate(body.layers):
        fused, out, mlp = block.attention.query_key_value, block.attention.dense, block.mlp
        weights = rearrange(fused.weight, "(h qkv d) m -> qkv (h d) m", h=heads, qkv=3)
        parts: StateDict = {
            "ln1.w": block.input_layernorm.weight,
            "ln1.b": block.input_layernorm.bias,
            "ln2.w": block.post_attention_layernorm.weight,
            "ln2.b": block.post_attention_layernorm.bias,
            "attn.W_O": rearrange(out.weight, "m (h d) -> h d m", h=heads),
            "mlp.W_in": mlp.dense_h_to_4h.weight.T,
            "mlp.b_in": mlp.dense_h_to_4h.bias,
            "mlp.W_out": mlp.dense_4h_to_h.weight.T,
            "mlp.b_out": mlp.dense_4h_to_h.bias,
        }
        biases: Any = [None] * 3
        if fused.bias is not None:
            biases = rearrange(fused.bias, "(h qkv d) -> qkv (h d)", h=heads, qkv=3)
            parts["attn.b_O"] = out.bias
        for letter, weight, bias in zip("QKV", weights, biases, strict=True):
            parts |= split_heads(weight, bias, heads, (f"attn.W_{letter}", f"attn.b_{letter}"))
        state |= {f"blocks.{layer}.{name}": tensor for name, tensor in parts.items()}
    return state


_LLAMA_LIKE = Family(llama_config, llama_weights)
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA_LIKE,
    "MistralForCausalLM": _LLAMA_LIKE,
    "Qwen2ForCausalLM": _LLAMA_LIKE,
    "Qwen3ForCausalLM": Family(lambda c: llama_config(c) | {"use_qk_norm": True}, llama_weights),
    "GPT2LMHeadModel": Family(gpt2_config, gpt2_weights),
    "GPTNeoXForCausalLM": Family(neox_config, neox_weights),
}


def has_hooked() -> bool:
    """Whether the installed transformer-lens still has HookedTransformer (up to 3.9)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def build_hooked(hf_model: Any, tokenizer: Any) -> Any:
    """A HookedTransformer on the Hugging Face model's own tensors (copied only where noted).

    Raises Unsupported for what HookedTransformer does not compute.
    """
    import warnings

    if not has_hooked():
        raise InputError(
            "engine: expected transformer-lens 3.9 for hooked, found a version without "
            "HookedTransformer; use --engine bridge, or install 'transformer-lens<4'"
        )
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    architecture = type(hf_model).__name__
    if architecture not in FAMILIES:
        raise Unsupported(f"an architecture among {', '.join(sorted(FAMILIES))}", architecture)
    family = FAMILIES[architecture]
    device, dtype = hf_model.device, hf_model.dtype
    fields = family.config(hf_model.config)
    _check_activation(fields["act_fn"])
    config = HookedTransformerConfig(
        **fields,
        dtype=dtype,
        device=str(device),
        init_weights=False,
        original_architecture=architecture,
        model_name=architecture,
    )
    with warnings.catch_warnings():
        # 3.9 announces that 4.0 drops the class; the engine setting is our answer to that.
        warnings.simplefilter("ignore", DeprecationWarning)
        hooked = HookedTransformer(config, tokenizer=None, move_to_device=False)
    _assign(hooked, family.weights(hf_model))
    torch.nn.Module.to(hooked, device)
    # set_tokenizer would load the tokenizer anew, from the network for a hub id.
    hooked.tokenizer = tokenizer
    hooked.cfg.tokenizer_prepends_bos = False
    install(hooked)
    return hooked.eval().requires_grad_(False)


def _check_activation(name: str) -> None:
    from transformer_lens.config.hooked_transformer_config import SUPPORTED_ACTIVATIONS

    if name not in SUPPORTED_ACTIVATIONS:
        raise Unsupported(f"an activation among {', '.join(SUPPORTED_ACTIVATIONS)}", name)


def _assign(hooked: Any, state: StateDict) -> None:
    """Put the tensors in place of the parameters; biases the model lacks stay zero."""
    own = dict(hooked.named_parameters())
    wrong = [f"{k} {tuple(v.shape)}" for k, v in state.items() if own[k].shape != v.shape]
    unset = [k for k in own if k not in state and ".b_" not in k and "._b_" not in k]
    if wrong or unset:
        raise InputError(
            f"model: its tensors do not fit its config (shapes: {', '.join(wrong[:3]) or 'right'}; "
            f"missing: {', '.join(unset[:3]) or 'none'})"
        )
    hooked.load_state_dict(state, strict=False, assign=True)
