"""The forward passes: read z, edit z, score the last token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.bridge import (
    beginning_at,
    is_bridge,
    real_tokens_last,
    stopping_after_blocks,
)
from tl_headnorm.engine.short_blocks import Tail, stopping_at
from tl_headnorm.errors import InputError
from tl_headnorm.measures import take_position

ZByLayer = dict[int, Float[Tensor, "batch pos head d_head"]]
# Takes a layer and what was read of it; a tensor given back takes the place of z.
Take = Callable[[int, dict[str, Tensor]], Tensor | None]


def head_sum_name(tl: Any, layer: int) -> str:
    """Where the sum over the heads (and b_O) is seen: before a norm that may follow it."""
    return f"blocks.{layer}.attn.hook_out" if is_bridge(tl) else hook_names.attn_out(layer)


def W_O(tl: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Output weights of a layer's heads, as the model holds them (on its first device)."""
    return tl.blocks[layer].attn.W_O.detach().to(tl.cfg.device)


def b_O(tl: Any, layer: int) -> Float[Tensor, " d_model"]:
    """The bias a layer's attention adds beside its heads."""
    bias = tl.blocks[layer].attn.b_O
    if bias is None:  # the bridge's way of saying that there is none
        return W_O(tl, layer).new_zeros(tl.cfg.d_model)
    return bias.detach().to(tl.cfg.device)


def can_share_prefix(tl: Any) -> bool:
    """Whether a prefix run once saves anything; a bridge computes it again with every batch."""
    return not is_bridge(tl)


@dataclass(frozen=True)
class Prefix:
    """Tokens that many prompts begin with, run once: their keys, values and z.

    `cache` is None where the model keeps none: the ids then run again before every batch.
    """

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


def run_prefix(
    tl: Any, ids: Sequence[int], *, reads: Sequence[str] = ("z",), take: Take | None = None
) -> Prefix:
    """Run a common prefix on its own and freeze its keys and values for later batches.

    With `take` its layers are handed over as in `run_layers`, and z is not kept.
    """
    tokens = torch.tensor([list(ids)], device=tl.cfg.device)
    if is_bridge(tl):
        return Prefix(tuple(ids), None, run_z(tl, tokens, torch.ones_like(tokens)).z)
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    _check_length(tl, len(ids))
    cache = TransformerLensKeyValueCache.init_cache(tl.cfg, tl.cfg.device, 1)
    z: ZByLayer = {}
    if set(reads) == {"z"}:
        z, _, _ = _cached(tl, tokens, torch.ones_like(tokens), cache)
        while take and z:
            take(layer := next(iter(z)), {"z": z.pop(layer)})
    else:
        keep = take or (lambda layer, read: z.__setitem__(layer, read["z"]))
        with tl.hooks(fwd_hooks=_readers(tl, reads, keep)):
            to_last_block(tl, tokens, torch.ones_like(tokens), past=cache)
    cache.freeze()
    return Prefix(tuple(ids), cache, z)


def _readers(tl: Any, reads: Sequence[str], take: Take) -> list[tuple[str, Any]]:
    """Hooks that gather what is read of each layer and hand it over at z, its last part."""
    held: dict[str, Tensor] = {}

    def reader(layer: int, name: str) -> Any:
        def read(value: Tensor, hook: Any) -> Tensor | None:
            held[name] = value
            if name != "z":
                return None
            found = dict(held)
            held.clear()
            return take(layer, found)

        return read

    return [
        (getattr(hook_names, name)(layer), reader(layer, name))
        for layer in range(tl.cfg.n_layers)
        for name in reads
    ]


def run_layers(
    tl: Any,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    take: Take,
    *,
    reads: Sequence[str] = ("z",),
    prefix: Prefix | None = None,
    tail: Tail | None = None,
    edits: bool = False,
) -> Float[Tensor, "batch resid_pos d_model"]:
    """Hand every layer's activations to `take(layer, {name: activation})`.

    `reads` are names of hook points in hook_names.py, z among them. z alone comes from
    `run_with_cache` filtered to `hook_z`. Where more is read, or z is edited, `take` is called as
    the pass goes: only what is read is hooked, and only one layer's is held at a time. Their
    first axis is the batch; what the prefix gave is not in them, but for a pattern's keys. With a
    `tail`, positions are cut by the last block alone, or by `run_z` where z alone is read.
    Returns the residual stream after the last block. With `edits`, a tensor that `take` gives
    back takes the place of z. A bridge hands over z only, when all is done.
    """
    _check_length(tl, ids.shape[1] + (len(prefix) if prefix else 0))
    if is_bridge(tl) and set(reads) - {"z"}:
        raise InputError(
            f"measures: expected what reads z alone on a bridge, found "
            f"{', '.join(sorted(set(reads) - {'z'}))} to be read; use --engine hooked"
        )
    if is_bridge(tl) or (set(reads) == {"z"} and not edits):
        seen = run_z(tl, ids, mask, prefix=prefix, tail=tail)
        while seen.z:
            take(layer := next(iter(seen.z)), {"z": seen.z.pop(layer)})
        return seen.resid
    past = _for_batch(tl, prefix, len(ids)) if prefix else None
    with (
        tl.hooks(fwd_hooks=_readers(tl, reads, take)),
        stopping_at(tl, tail) if tail else nullcontext(False) as shortened,
    ):
        resid = to_last_block(tl, ids, mask, past=past)
    return take_position(resid, tail.last) if tail and not shortened else resid


def past_values(prefix: Prefix, layer: int) -> Float[Tensor, "1 pos kv_head d_head"]:
    """Values of the prefix's tokens."""
    return prefix.cache.entries[layer].past_values


def answer_directions(
    tl: Any,
    letter_ids: Int[Tensor, "batch option"],
    n_options: Int[Tensor, " batch"],
    answers: Int[Tensor, " batch"],
) -> Float[Tensor, "batch d_model"]:
    """u with x u / scale = logit of the answer's letter minus the mean of the other letters'.

    x is the residual at the last token (centred within u where the final norm centres), scale
    `final_scale`; what biases add is left out. float32 or wider.
    """
    norm, W_U = tl.ln_final, tl.unembed.W_U
    wide = torch.promote_types(W_U.dtype, torch.float32)
    columns = W_U.T[letter_ids].to(wide)
    option = torch.arange(letter_ids.shape[1], device=letter_ids.device)
    right = option == answers[:, None]
    others = (option < n_options[:, None]) & ~right
    weight = right.to(wide) - others.to(wide) / others.sum(1, keepdim=True).clamp_min(1)
    direction = torch.einsum("bo,bom->bm", weight, columns) * norm.w.to(wide)
    if tl.cfg.normalization_type == "LN":  # <x - mean(x), u> = <x, u - mean(u)>
        direction = direction - direction.mean(-1, keepdim=True)
    return direction


def final_scale(tl: Any, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
    """What the final norm divides a residual vector by."""
    wide = resid.to(torch.promote_types(resid.dtype, torch.float32))
    if tl.cfg.normalization_type == "LN":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide.pow(2).mean(-1) + tl.ln_final.eps).sqrt()


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
    _check_length(tl, ids.shape[1] + (len(prefix) if prefix else 0))
    if is_bridge(tl):
        return _run_bridge(tl, ids, mask, prefix, tail, extra)
    past = _for_batch(tl, prefix, len(ids)) if prefix else None
    with stopping_at(tl, tail) if tail else nullcontext(False) as shortened:
        z, resid, found = _cached(tl, ids, mask, past, extra)
    if tail and not tail.z_everywhere:
        z = {k: take_position(v, tail.last) if v.shape[1] > 1 else v for k, v in z.items()}
    if tail and not shortened:
        resid = take_position(resid, tail.last)
    return Pass(z, resid, found)


def _cached(
    tl: Any, ids: Tensor, mask: Tensor, past: Any, extra: Sequence[str] = ()
) -> tuple[ZByLayer, Tensor, dict[str, Tensor]]:
    """`run_with_cache` filtered to hook_z and `extra`, up to the last block."""
    names = {hook_names.z(layer): layer for layer in range(tl.cfg.n_layers)}
    wanted = {*names, *extra}
    resid, cache = tl.run_with_cache(
        ids,
        attention_mask=mask,
        past_kv_cache=past,
        names_filter=lambda name: name in wanted,
        stop_at_layer=tl.cfg.n_layers,
        return_cache_object=False,
    )
    z = {layer: cache[name] for name, layer in names.items() if name in cache}
    return z, resid, {name: cache[name] for name in extra if name in cache}


def _check_length(tl: Any, length: int) -> None:
    """Refuse what the model's positions or its sliding window do not cover."""
    if length > tl.cfg.n_ctx:
        raise InputError(
            f"prompt: expected at most {tl.cfg.n_ctx} tokens, the context this engine computes "
            f"faithfully, found {length}; shorten it"
        )


def _run_bridge(
    tl: Any, ids: Tensor, mask: Tensor, prefix: Prefix | None, tail: Tail | None, extra: Sequence
) -> Pass:
    """run_z on a bridge, where a prefix stands before every row and no block is cut short."""
    names = {hook_names.z(layer): layer for layer in range(tl.cfg.n_layers)}
    wanted = {*names, *extra}
    ids, mask, back = _with_prefix(ids, mask, prefix)
    with stopping_after_blocks(tl):
        resid, cache = tl.run_with_cache(
            ids,
            attention_mask=mask,
            names_filter=lambda name: name in wanted,
            return_cache_object=False,
            output_attentions=False,  # else every layer's pattern is kept
            use_cache=False,
        )
    found = {name: _in_order(value.to(ids.device), back) for name, value in cache.items()}
    z = {layer: _by_head(tl, found[name]) for name, layer in names.items() if name in found}
    resid = _in_order(resid.to(ids.device), back)
    if tail and not tail.z_everywhere:
        z = {layer: take_position(value, tail.last) for layer, value in z.items()}
    if tail:
        resid = take_position(resid, tail.last)
    return Pass(z, resid, {name: found[name] for name in extra if name in found})


def _with_prefix(
    ids: Tensor, mask: Tensor, prefix: Prefix | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Whole rows, without a gap between prefix and prompt, and the places of the prompt in them."""
    if prefix is None:
        return ids, mask, None
    head = torch.tensor(prefix.ids, device=ids.device).expand(len(ids), -1)
    whole, seen = torch.cat([head, ids], 1), torch.cat([torch.ones_like(head), mask], 1)
    order = real_tokens_last(seen)
    back = order.argsort(1)[:, len(prefix) :]
    return whole.gather(1, order), seen.gather(1, order), back


def _in_order(x: Tensor, back: Tensor | None) -> Tensor:
    """x [batch, pos, ...] at the given positions of every row."""
    return x if back is None else x[torch.arange(len(x), device=x.device)[:, None], back]


def _by_head(tl: Any, z: Tensor) -> Float[Tensor, "batch pos head d_head"]:
    """Some bridges hand out z with its heads side by side."""
    return z if z.dim() == 4 else rearrange(z, "b p (h d) -> b p h d", h=tl.cfg.n_heads)


def to_last_block(
    tl: Any,
    start: Shaped[Tensor, "batch pos *d_model"],
    mask: Int[Tensor, "batch pos"],
    *,
    start_layer: int = 0,
    past: Any = None,
) -> Float[Tensor, "batch resid_pos d_model"]:
    """The residual stream after the last block, by either engine; hooks set before act in it.

    `start` are token ids, or the residual before `start_layer`. A bridge runs the whole model
    all the same, on any tokens, and has the residual put in its place.
    """
    if is_bridge(tl):
        ids = start if start.dim() == 2 else torch.zeros_like(mask)
        put = beginning_at(tl, start_layer, start) if start.dim() == 3 else nullcontext()
        with put, stopping_after_blocks(tl):
            return tl(ids, attention_mask=mask, use_cache=False).to(mask.device)
    begin = {"start_at_layer": start_layer} if start_layer or start.dim() == 3 else {}
    return tl(
        start, attention_mask=mask, past_kv_cache=past, stop_at_layer=tl.cfg.n_layers, **begin
    )


def run_resid(
    tl: Any,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    prefix: Prefix | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last block; nothing is kept of what leads there."""
    _check_length(tl, ids.shape[1] + (len(prefix) if prefix else 0))
    if is_bridge(tl):
        ids, mask, back = _with_prefix(ids, mask, prefix)
        return _in_order(to_last_block(tl, ids, mask), back)
    past = _for_batch(tl, prefix, len(ids)) if prefix else None
    return to_last_block(tl, ids, mask, past=past)


def logits(tl: Any, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
    """Final norm and unembedding of residual vectors."""
    return _capped(tl, tl.unembed(tl.ln_final(resid)))


def _capped(tl: Any, logits: Tensor) -> Tensor:
    """Gemma 2 bends its logits after the unembedding."""
    cap = getattr(tl.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits


def letter_logits(
    tl: Any,
    resid: Float[Tensor, "batch d_model"],
    letter_ids: Int[Tensor, "batch option"],
) -> Float[Tensor, "batch option"]:
    """Logits of a few tokens per prompt at one residual vector; the rest is never unembedded.

    float32 or wider, so that ties of a narrow type do not choose the answer.
    """
    final = tl.ln_final(resid.unsqueeze(1)).squeeze(1)
    columns = tl.unembed.W_U.T[letter_ids.to(tl.unembed.W_U.device)].to(final.device)
    wide = torch.promote_types(final.dtype, torch.float32)
    logits = torch.einsum("bm,bom->bo", final.to(wide), columns.to(wide))
    bias = tl.unembed.b_U
    return _capped(tl, logits + (0 if bias is None else bias.to(final.device)[letter_ids].to(wide)))


@contextmanager
def zero_heads(tl: Any, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """While inside, z of the given (layer, head) pairs is zero at every position."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def editor(chosen: list[int]) -> Any:
        def zero(z: Tensor, hook: Any) -> Tensor:
            edited = z.clone()
            _by_head(tl, edited)[:, :, chosen] = 0
            return edited

        return zero

    with tl.hooks(fwd_hooks=[(hook_names.z(layer), editor(hs)) for layer, hs in by_layer.items()]):
        yield
