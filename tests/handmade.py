"""Small models whose answer is known: built by setting weights, in float64."""

import warnings

import torch

from tl_headnorm.model.loading import Model, ModelInfo
from tl_headnorm.model.random_models import FAMILY_MODELS, family_model

__all__ = ["FAMILY_MODELS", "as_model", "family_model", "hooked", "llama"]

LAYERS, HEADS, D_HEAD, D_MODEL, VOCAB = 2, 3, 4, 10, 17


def hooked(n_layers=LAYERS, n_heads=HEADS, d_head=D_HEAD, seed=0, **fields):
    """A random attention-only HookedTransformer in float64; all sizes differ."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(seed)
    settings = {
        "d_model": D_MODEL,
        "d_vocab": VOCAB,
        "n_ctx": 16,
        "attn_only": True,
        "normalization_type": None,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "act_fn": "silu",
        "dtype": torch.float64,
        "device": "cpu",
        **fields,
    }
    config = HookedTransformerConfig(n_layers=n_layers, n_heads=n_heads, d_head=d_head, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tl = HookedTransformer(config)
    for parameter in tl.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return tl.eval().requires_grad_(False)


def as_model(tl, tokenizer=None):
    """What the package passes around, for a model that Hugging Face knows nothing of."""
    cfg = tl.cfg
    info = ModelInfo(
        source="handmade",
        revision=None,
        architecture="handmade",
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        dtype="fp64",
        engine="hooked",
    )
    return Model(tl=tl, hf=None, tokenizer=tokenizer, info=info)


def llama(seed=0, dtype=torch.float32, **fields):
    """A small random Hugging Face LLaMA with odd sizes, made on the spot."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 97,
        "hidden_size": 42,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
