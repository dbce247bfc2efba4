"""The only file that names TransformerLens hook points: read z, edit z, score the last token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.fast import Tail, stopping_at
from tl_headnorm.measures import take_position

ZByLayer = dict[int, Float[Tensor, "batch pos head d_head"]]


def z_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def attn_out_name(layer: int) -> str:
    return f"blocks.{layer}.hook_attn_out"


def W_O(tl: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Output weights of a layer's heads, as the model holds them."""
    return tl.blocks[layer].attn.W_O.detach()


def b_O(tl: Any, layer: int) -> Float[Tensor, " d_model"]:
    """The bias a layer's attention adds beside its heads."""
    return tl.blocks[layer].attn.b_O.detach()


@dataclass(frozen=True)
class Prefix:
    """Tokens that many prompts begin with, run once: their keys, values and z."""

    ids: tuple[int, ...]
    cache: Any
    z: ZByLayer

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pass:
    """What one forward pass gave: z by layer (missing where the hook did not fire), residual."""

    z: ZByLayer
    resid: Float[Tensor, "batch resid_pos d_model"]
    extra: dict[str, Tensor]


def run_prefix(tl: Any, ids: Sequence[int]) -> Prefix:
    """Run a common prefix on its own and freeze its keys and values for later batches."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    tokens = torch.tensor([list(ids)], device=tl.cfg.device)
    cache = TransformerLensKeyValueCache.init_cache(tl.cfg, tl.cfg.device, 1)
    names = {z_name(layer): layer for layer in range(tl.cfg.n_layers)}
    _, found = tl.run_with_cache(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_kv_cache=cache,
        names_filter=lambda name: name in names,
        stop_at_layer=tl.cfg.n_layers,
        return_cache_object=False,
    )
    cache.freeze()
    return Prefix(tuple(ids), cache, {names[name]: z for name, z in found.items()})


def _for_batch(tl: Any, prefix: Prefix, batch_size: int) -> Any:
    """The prefix's cache, seen by every row of a batch; nothing is copied."""
    cache = copy(prefix.cache)
    cache.previous_attention_mask = prefix.cache.previous_attention_mask.expand(batch_size, -1)
    cache.entries = [copy(entry) for entry in prefix.cache.entries]
    for entry, single in zip(cache.entries, prefix.cache.entries, strict=True):
        entry.past_keys = single.past_keys.expand(batch_size, -1, -1, -1)
        entry.past_values = single.past_values.expand(batch_size, -1, -1, -1)
        single.__dict__.setdefault("memo", {})
        entry.memo = single.memo
    return cache


def run_z(
    tl: Any,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    prefix: Prefix | None = None,
    tail: Tail | None = None,
    extra: Sequence[str] = (),
) -> Pass:
    """z of every layer, the residual stream after the last block, and any `extra` activations.

    One forward pass by `run_with_cache`, filtered to `hook_z`; neither the final norm nor the
    unembedding is computed. With a `prefix`, ids and mask are what follows it. With a `tail`,
    z is [batch, 1, head, d_head] unless it is wanted everywhere, the residual [batch, 1,
    d_model], and the last block computes no more than that.
    """
    n_layers = tl.cfg.n_layers
    names = {z_name(layer): layer for layer in range(n_layers)}
    wanted = {*names, *extra}
    past = _for_batch(tl, prefix, len(ids)) if prefix else None
    with stopping_at(tl, tail) if tail else nullcontext(False) as shortened:
        resid, cache = tl.run_with_cache(
            ids,
            attention_mask=mask,
            past_kv_cache=past,
            names_filter=lambda name: name in wanted,
            stop_at_layer=n_layers,
            return_cache_object=False,
        )
    z = {layer: cache[name] for name, layer in names.items() if name in cache}
    if tail and not tail.z_everywhere:
        z = {k: take_position(v, tail.last) if v.shape[1] > 1 else v for k, v in z.items()}
    if tail and not shortened:
        resid = take_position(resid, tail.last)
    return Pass(z, resid, {name: cache[name] for name in extra if name in cache})


def run_resid(
    tl: Any,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    prefix: Prefix | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last block; nothing is kept of what leads there."""
    past = _for_batch(tl, prefix, len(ids)) if prefix else None
    return tl(ids, attention_mask=mask, past_kv_cache=past, stop_at_layer=tl.cfg.n_layers)


def logits(tl: Any, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
    """Final norm and unembedding of residual vectors."""
    return tl.unembed(tl.ln_final(resid))


def letter_logits(
    tl: Any,
    resid: Float[Tensor, "batch d_model"],
    letter_ids: Int[Tensor, "batch option"],
) -> Float[Tensor, "batch option"]:
    """Logits of a few tokens per prompt at one residual vector; the rest is never unembedded.

    float32 or wider, so that ties of a narrow type do not choose the answer.
    """
    final = tl.ln_final(resid.unsqueeze(1)).squeeze(1)
    columns = tl.unembed.W_U.T[letter_ids]
    wide = torch.promote_types(final.dtype, torch.float32)
    logits = torch.einsum("bm,bom->bo", final.to(wide), columns.to(wide))
    return logits + tl.unembed.b_U[letter_ids].to(wide)


@contextmanager
def zero_heads(tl: Any, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """While inside, z of the given (layer, head) pairs is zero at every position."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def editor(chosen: list[int]) -> Any:
        def zero(z: Tensor, hook: Any) -> Tensor:
            edited = z.clone()
            edited[:, :, chosen] = 0
            return edited

        return zero

    with tl.hooks(fwd_hooks=[(z_name(layer), editor(hs)) for layer, hs in by_layer.items()]):
        yield
