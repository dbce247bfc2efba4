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

from tl_headnorm.errors import InputError
from tl_headnorm.fast import install

StateDict = dict[str, Tensor]


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
        raise InputError(
            f"model: expected RoPE scaling default, linear or llama3, found {kind!r}, which "
            "HookedTransformer does not compute"
        )
    return fields


def llama_config(hf_config: Any) -> dict[str, Any]:
    """HookedTransformerConfig fields of a LLaMA-architecture model, read from its own config."""
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    d_head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    return {
        "d_model": hf_config.hidden_size,
        "d_head": d_head,
        "n_heads": heads,
        "n_key_value_heads": kv_heads if kv_heads != heads else None,
        "d_mlp": hf_config.intermediate_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_ctx": hf_config.max_position_embeddings,
        "d_vocab": hf_config.vocab_size,
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


def split_heads(linear: Any, n_heads: int, names: tuple[str, str]) -> StateDict:
    """W [head, d_model, d_head] and b [head, d_head] of a q, k or v projection, as views."""
    state = {names[0]: rearrange(linear.weight, "(h d) m -> h m d", h=n_heads)}
    if linear.bias is not None:
        state[names[1]] = rearrange(linear.bias, "(h d) -> h d", h=n_heads)
    return state


def llama_weights(hf_model: Any) -> StateDict:
    """HookedTransformer's parameter names to views of a LLaMA-architecture model's tensors."""
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
        parts |= split_heads(attention.q_proj, heads, ("attn.W_Q", "attn.b_Q"))
        parts |= split_heads(attention.k_proj, kv_heads, (f"attn.{mark}W_K", f"attn.{mark}b_K"))
        parts |= split_heads(attention.v_proj, kv_heads, (f"attn.{mark}W_V", f"attn.{mark}b_V"))
        if attention.o_proj.bias is not None:
            parts["attn.b_O"] = attention.o_proj.bias
        _refuse_mlp_bias(mlp)
        state |= {f"blocks.{layer}.{name}": tensor for name, tensor in parts.items()}
    return state


def _refuse_mlp_bias(mlp: Any) -> None:
    """HookedTransformer has no bias inside the gate, so such a model would come out wrong."""
    if any(layer.bias is not None for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise InputError(
            "model: expected mlp_bias false, found biases in the gated MLP, which "
            "HookedTransformer does not compute"
        )


FAMILIES: dict[str, Family] = {"LlamaForCausalLM": Family(llama_config, llama_weights)}


def build_hooked(hf_model: Any, tokenizer: Any) -> Any:
    """A HookedTransformer on the Hugging Face model's own tensors (nothing is copied).

    Raises InputError for an architecture that is not in FAMILIES.
    """
    import warnings

    from transformer_lens import HookedTransformer, HookedTransformerConfig

    architecture = type(hf_model).__name__
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"model: expected an architecture HookedTransformer can take over ({known}), "
            f"found {architecture}"
        )
    family = FAMILIES[architecture]
    device, dtype = hf_model.device, hf_model.dtype
    config = HookedTransformerConfig(
        **family.config(hf_model.config),
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
