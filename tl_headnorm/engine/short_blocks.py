"""A shorter forward for HookedTransformer's blocks, equal to the stock one up to rounding.

TransformerLens computes a block so that everything in it can be hooked: the first norm three
times, scores and pattern in full, masks and rotary tables anew in every layer. Here a block
fires only the hook points of FIRED. Where any other one of its hook points has a hook, or the
model has a part this file does not know, the stock forward runs, so hooks always see what they
would see without this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.engine.positions import take_position
from tl_headnorm.engine.protocol import Tail

FIRED = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_pattern",
    "attn.hook_z",
)

# RMSNorm, rotary halves, gated MLP without biases; no norm of queries and keys.
KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclass
class _Layout:
    """Masks and rotary tables of one forward pass, the same in every layer."""

    source: Tensor
    n_new: int
    allowed: Bool[Tensor, "batch 1 q k"]
    real_keys: Bool[Tensor, "batch 1 1 k"]
    cos: Float[Tensor, "batch q 1 half"]
    sin: Float[Tensor, "batch q 1 half"]


class Shared:
    """State shared by a model's blocks: the layout of the pass and the requested tail."""

    def __init__(self) -> None:
        self.layout: _Layout | None = None
        self.tail: Tail | None = None

    def layout_of(self, attn: Any, mask: Int[Tensor, "batch k"], n_new: int) -> _Layout:
        known = self.layout
        if known is None or known.source is not mask or known.n_new != n_new:
            known = self.layout = _make_layout(attn, mask, n_new)
        return known


def _make_layout(attn: Any, mask: Tensor, n_new: int) -> _Layout:
    """Causal over real tokens; every query may see itself, so that a pad row stays finite."""
    n_keys = mask.shape[1]
    keys = torch.arange(n_keys, device=mask.device)
    queries = keys[n_keys - n_new :, None]
    real = mask.bool()[:, None, None, :]
    allowed = (keys <= queries) & real
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, n_keys - n_new :]
    cos, sin = rotary_tables(attn, positions)
    return _Layout(mask, n_new, allowed | (keys == queries), real, cos, sin)


def rotary_tables(attn: Any, positions: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, pos, 1, half] at the given positions, from TransformerLens' tables."""
    needed = int(positions.max()) + 1
    if needed > attn.rotary_cos.shape[0]:
        attn._extend_rotary_embeddings(max(needed, 2 * attn.rotary_cos.shape[0]))
    half = attn.rotary_cos.shape[-1] // 2
    return (
        attn.rotary_cos[positions, None, :half],
        attn.rotary_sin[positions, None, :half],
    )


def rotate(x: Float[Tensor, "b p h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b p h d"]:
    """Rotary embedding, halves paired (GPT-NeoX order)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm in Hugging Face's order of roundings, so that bf16 rounds as it does, bit for bit.

    TransformerLens divides by sqrt(mean x^2 + eps) where Hugging Face multiplies by rsqrt: in
    float32 the last bit, which now and then is another bf16 number after the cast.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    scale = (wide.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
    return (wide * scale).to(x.dtype) * norm.w


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Float[Tensor, "b p h d"]:
    n_heads, _, d_head = weight.shape
    flat = weight.transpose(1, 2).reshape(n_heads * d_head, -1)  # a view of the original's layout
    return F.linear(x, flat, bias.reshape(-1)).view(*x.shape[:2], n_heads, d_head)


def _attention(
    attn: Any, x: Tensor, past: Any, mask: Tensor, shared: Shared, tail: Tail | None
) -> Float[Tensor, "b q h d"]:
    """z at all new positions, or at the tail's last one."""
    grouped = attn.cfg.n_key_value_heads is not None
    W_K, b_K = (attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K)
    W_V, b_V = (attn._W_V, attn._b_V) if grouped else (attn.W_V, attn.b_V)
    layout = shared.layout_of(attn, mask, x.shape[1])
    cos, sin, allowed = layout.cos, layout.sin, layout.allowed
    k = rotate(attn.hook_k(_project(x, W_K, b_K)), cos, sin)
    v = attn.hook_v(_project(x, W_V, b_V))
    if past is not None and past.past_keys.shape[1] > 0:
        k = torch.cat((_rotated_past(attn, past), k), dim=1)
        v = torch.cat((past.past_values, v), dim=1)
    if tail is not None and not tail.z_everywhere:
        x, cos, sin = (take_position(t, tail.last) for t in (x, cos, sin))
        allowed = take_position(allowed.transpose(1, 2), tail.last).transpose(1, 2)
    q = rotate(attn.hook_q(_project(x, attn.W_Q, attn.b_Q)), cos, sin)
    repeats = attn.cfg.n_heads // k.shape[2]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    if watched(attn.hook_pattern):
        return attn.hook_z(_by_pattern(attn, q, k, v, allowed, layout.real_keys))
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        scale=1 / attn.attn_scale,
    )
    return attn.hook_z(z.transpose(1, 2))


def _by_pattern(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, real: Tensor
) -> Float[Tensor, "b q h d"]:
    """z with the attention weights in full, as hook_pattern is to see them: in float32 or wider.

    As in the stock forward, a padded key has no weight, nor has anything at a query before the
    first real key.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / attn.attn_scale
    seen = allowed & real
    wide = torch.promote_types(scores.dtype, torch.float32)
    pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide)
    pattern = attn.hook_pattern(pattern.masked_fill(~seen.any(-1, keepdim=True), 0))
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v)


def watched(point: Any) -> bool:
    return bool(point._forward_hooks or point._backward_hooks)


def _rotated_past(attn: Any, past: Any) -> Tensor:
    """The cached keys with their rotation; remembered, since a frozen cache serves many batches.

    TransformerLens caches keys before rotation. A prefix is real at every position, so its
    positions are 0, 1, ... in every row.
    """
    keys = past.past_keys
    memo: dict[str, Tensor] = past.__dict__.setdefault("memo", {})
    if "rotated" not in memo:
        positions = torch.arange(keys.shape[1], device=keys.device)[None]
        memo["rotated"] = rotate(keys[:1], *rotary_tables(attn, positions))
    return memo["rotated"].expand(keys.shape[0], -1, -1, -1)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    # b_in is zero in every family `knows` admits: those with MLP biases are refused at load.
    post = mlp.act_fn(F.linear(x, mlp.W_gate.T)) * F.linear(x, mlp.W_in.T)
    return F.linear(post, mlp.W_out.T, mlp.b_out)


def mlp_out(block: Any, resid_mid: Float[Tensor, "b p m"]) -> Float[Tensor, "b p m"]:
    """The output of a block's MLP, with the roundings of the forward that the block has."""
    if "stock_forward" in block.__dict__:
        return _mlp(block.mlp, rms_norm(block.ln2, resid_mid))
    out: Tensor = block.mlp(block.ln2(resid_mid))
    return out


def _usable(block: Any, past: Any, mask: Tensor | None, cut: bool) -> bool:
    """Whether nothing but FIRED is watched and the pass is of the kind computed here."""
    if mask is None or any(map(watched, block.silent)):
        return False
    if cut and watched(block.attn.hook_pattern):
        return False  # whoever looks at the pattern sees all of it
    cfg = block.cfg
    if cfg.use_attn_result or cfg.use_split_qkv_input or cfg.use_attn_in or cfg.use_hook_mlp_in:
        return False
    # A growing cache must be filled by the stock forward; a frozen prefix is only read.
    return past is None or past.frozen


def _forward(
    block: Any,
    resid_pre: Tensor,
    shortformer_pos_embed: Tensor | None = None,
    past_kv_cache_entry: Any = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    shared: Shared = block.shared
    tail = shared.tail if block.is_last else None
    cut = tail is not None and not tail.z_everywhere
    if attention_mask is None or not _usable(block, past_kv_cache_entry, attention_mask, cut):
        resid = block.stock_forward(
            resid_pre, shortformer_pos_embed, past_kv_cache_entry, attention_mask
        )
        return resid if tail is None else take_position(resid, tail.last)
    if block.is_first:
        shared.layout = None  # a mask changed in place since the last pass must not be missed
    resid_pre = block.hook_resid_pre(resid_pre)
    normed = rms_norm(block.ln1, resid_pre)
    z = _attention(block.attn, normed, past_kv_cache_entry, attention_mask, shared, tail)
    if tail is not None:
        resid_pre = take_position(resid_pre, tail.last)
        if not tail.resid:
            return resid_pre
        z = take_position(z, tail.last) if tail.z_everywhere else z
    W_O = block.attn.W_O
    flat = W_O.permute(2, 0, 1).reshape(W_O.shape[2], -1)  # a view of the original's layout
    attn_out = block.hook_attn_out(F.linear(z.reshape(*z.shape[:2], -1), flat, block.attn.b_O))
    resid_mid = block.hook_resid_mid(resid_pre + attn_out)
    mlp_out = block.hook_mlp_out(_mlp(block.mlp, rms_norm(block.ln2, resid_mid)))
    return block.hook_resid_post(resid_mid + mlp_out)


def knows(tl: Any) -> bool:
    """Whether every part of the model is one this file computes."""
    cfg = tl.cfg
    return bool(
        cfg.normalization_type == "RMS"
        and cfg.positional_embedding_type == "rotary"
        and cfg.rotary_dim == cfg.d_head
        and not cfg.rotary_adjacent_pairs
        and cfg.gated_mlp
        and cfg.original_architecture in KNOWN
        and not cfg.attn_only
        and not cfg.parallel_attn_mlp
        and not cfg.use_qk_norm
        and not cfg.use_local_attn
        and not cfg.use_attention_sinks
        and not cfg.use_normalization_before_and_after
        and not cfg.scale_attn_by_inverse_layer_idx
        and cfg.attn_scores_soft_cap <= 0
        and cfg.clip_qkv is None
    )


def install(tl: Any) -> bool:
    """Give the model's blocks the short forward; False where the model has an unknown part."""
    if not knows(tl):
        return False
    shared = Shared()
    for index, block in enumerate(tl.blocks):
        points = {name: p for name, p in block.named_modules() if type(p).__name__ == "HookPoint"}
        block.silent = [point for name, point in points.items() if name not in FIRED]
        block.is_first, block.is_last = index == 0, index == len(tl.blocks) - 1
        block.stock_forward = block.forward
        block.shared = shared
        block.forward = MethodType(_forward, block)
    return True


def uninstall(tl: Any) -> None:
    """Back to the stock forward."""
    for block in tl.blocks:
        if "stock_forward" in block.__dict__:
            for name in ("forward", "stock_forward", "silent", "shared", "is_first", "is_last"):
                delattr(block, name)


def installed(tl: Any) -> bool:
    return "stock_forward" in tl.blocks[0].__dict__


@contextmanager
def stopping_at(tl: Any, tail: Tail) -> Iterator[bool]:
    """While inside, the last block computes only what `tail` asks for (False: it cannot)."""
    if not installed(tl):
        yield False
        return
    shared: Shared = tl.blocks[0].shared
    shared.tail = tail
    try:
        yield True
    finally:
        shared.tail = shared.layout = None
