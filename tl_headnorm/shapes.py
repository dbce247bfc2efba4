"""Randomly initialised models of a known shape, for speed, memory and agreement."""

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
