"""Randomly initialised models of a known shape, for speed, memory and agreement."""

from dataclasses import dataclass, field
from typing import Any

import torch

# meta-llama/Llama-3.2-1B, config.json of the published model.
LLAMA_3_2_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "initializer_range": 0.02,
}


def random_llama(
    dtype: torch.dtype = torch.bfloat16,
    *,
    n_layers: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Any:
    """A Hugging Face LlamaForCausalLM with LLaMA 3.2-1B's configuration and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    changed = {"num_hidden_layers": n_layers, "vocab_size": vocab_size}
    settings = LLAMA_3_2_1B | {key: value for key, value in changed.items() if value}
    if vocab_size:
        settings |= {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**settings))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class FamilyModel:
    """A family's classes and config fields; `hooked`: HookedTransformer can compute it."""

    architecture: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    hooked: bool = True


_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
# GPT-2 and GPT-NeoX have no head_dim of their own: 6 heads of 8 make d_model 48.
FAMILY_MODELS = {
    "llama": FamilyModel("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": FamilyModel("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": FamilyModel(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "hidden_size": 48},
    ),
    "qwen3": FamilyModel("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gpt2": FamilyModel(
        "GPT2LMHeadModel", "GPT2Config", {"hidden_size": 48, "n_inner": 72, "n_positions": 96}
    ),
    "gpt_neox": FamilyModel(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {"hidden_size": 48, "rotary_pct": 0.5}
    ),
    "gemma2": FamilyModel(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "query_pre_attn_scalar": 11, "sliding_window": 20},
        hooked=False,
    ),
}


def family_model(
    name: str | FamilyModel, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A small random Hugging Face model of a family; biases and norms random too."""
    import transformers

    family = FAMILY_MODELS[name] if isinstance(name, str) else name
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 42,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 96,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **family.fields,
        **changes,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**settings)
    model = getattr(transformers, family.architecture)(config).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            shift = (
                0.0 if parameter_name.endswith("bias") or family.config.startswith("Gemma") else 1.0
            )
            torch.nn.init.normal_(parameter, mean=shift, std=0.3)
    return model.requires_grad_(False)
