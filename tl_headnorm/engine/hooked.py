"""HookedTransformer as an engine: late starts, a shared prefix, a last block cut short."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.positions import take_position
from tl_headnorm.engine.protocol import (
    CachedPass,
    Engine,
    FinalNorm,
    Hook,
    OnLayer,
    Pass,
    Prefix,
    Start,
    Tail,
    ZByLayer,
    layer_readers,
    wide,
)
from tl_headnorm.engine.short_blocks import mlp_out, stopping_at


class HookedEngine(Engine):
    """A HookedTransformer."""

    shares_prefix = True
    starts_late = True

    def __init__(self, tl: Any) -> None:
        self.tl = tl

    def run(
        self,
        start: Start,
        mask: Int[Tensor, "batch pos"],
        hooks: Sequence[Hook] = (),
        *,
        tail: Tail | None = None,
        prefix: Prefix | None = None,
        stop: int | None = None,
    ) -> Float[Tensor, "batch resid_pos d_model"]:
        if start.resid is None:
            self.check_length(mask.shape[1] + (len(prefix) if prefix else 0))
        past = _for_batch(prefix, len(mask)) if prefix else None
        with self.hooks(hooks), self._short(tail) as shortened:
            resid = self._forward(start, mask, past, stop)
        return take_position(resid, tail.last) if tail and not shortened else resid

    def _forward(
        self, start: Start, mask: Tensor, past: Any = None, stop: int | None = None
    ) -> Tensor:
        begin = start.ids if start.resid is None else start.resid
        assert begin is not None, "a pass begins at tokens or at a residual"
        at = {} if start.resid is None else {"start_at_layer": start.layer}
        stop = self.n_layers if stop is None else stop
        resid: Tensor = self.tl(
            begin, attention_mask=mask, past_kv_cache=past, stop_at_layer=stop, **at
        )
        return resid

    def _short(self, tail: Tail | None) -> AbstractContextManager[bool]:
        return stopping_at(self.tl, tail) if tail else nullcontext(False)

    def run_z(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        *,
        prefix: Prefix | None = None,
        tail: Tail | None = None,
        extra: Sequence[str] = (),
    ) -> Pass:
        self.check_length(ids.shape[1] + (len(prefix) if prefix else 0))
        past = _for_batch(prefix, len(ids)) if prefix else None
        with self._short(tail) as shortened:
            found = self._cached(ids, mask, past, extra)
        z, resid = found.z, found.resid
        if tail and not tail.z_everywhere:
            z = {k: take_position(v, tail.last) if v.shape[1] > 1 else v for k, v in z.items()}
        if tail and not shortened:
            resid = take_position(resid, tail.last)
        return Pass(z, resid, found.extra)

    def _cached(self, ids: Tensor, mask: Tensor, past: Any, extra: Sequence[str] = ()) -> Pass:
        """`run_with_cache` filtered to hook_z and `extra`, up to the last block."""
        names = {hook_names.z(layer): layer for layer in range(self.n_layers)}
        wanted = {*names, *extra}
        resid, cache = self.tl.run_with_cache(
            ids,
            attention_mask=mask,
            past_kv_cache=past,
            names_filter=lambda name: name in wanted,
            stop_at_layer=self.n_layers,
            return_cache_object=False,
        )
        z = {layer: cache[name] for name, layer in names.items() if name in cache}
        return Pass(z, resid, {name: cache[name] for name in extra if name in cache})

    def run_prefix(
        self,
        ids: Sequence[int],
        *,
        reads: Sequence[str] = ("z",),
        on_layer: OnLayer | None = None,
    ) -> Prefix:
        """The cache is frozen: later batches read it and do not add to it."""
        self.check_length(len(ids))
        tokens = torch.tensor([list(ids)], device=self.device)
        mask, cache = torch.ones_like(tokens), self._new_cache(1)
        z: ZByLayer = {}
        if set(reads) == {"z"}:
            z = self._cached(tokens, mask, cache).z
            while on_layer and z:
                on_layer(layer := next(iter(z)), {"z": z.pop(layer)})
        else:
            report = on_layer or (lambda layer, read: z.__setitem__(layer, read["z"]))
            with self.hooks(layer_readers(self.n_layers, reads, report)):
                self._forward(Start(tokens), mask, cache)
        cache.freeze()
        return Prefix(tuple(ids), cache, z)

    def _new_cache(self, n_rows: int) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, n_rows)

    def prefix_values(self, prefix: Prefix, layer: int) -> Float[Tensor, "1 pos kv_head d_head"]:
        values: Tensor = prefix.cache.entries[layer].past_values
        return values

    def cached_pass(self, n_rows: int) -> CachedPass:
        cache = self._new_cache(n_rows)

        def step(new: Tensor, mask: Tensor) -> Float[Tensor, "batch vocab"]:
            resid = self._forward(Start(new), mask[:, -new.shape[1] :], cache)
            return wide(self.logits(resid[:, -1:])[:, 0])

        return step

    @property
    def final_norm(self) -> FinalNorm:
        norm = self.tl.ln_final
        return FinalNorm(norm.w, norm.eps, self.cfg.normalization_type == "LN")

    def mlp(
        self, layer: int, resid_mid: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos d_model"]:
        return mlp_out(self.tl.blocks[layer], resid_mid)

    def head_sum_name(self, layer: int) -> str:
        return hook_names.attn_out(layer)


def _for_batch(prefix: Prefix, batch_size: int) -> Any:
    """The prefix's cache, expanded to every row of a batch; nothing is copied."""
    cache = copy(prefix.cache)
    cache.previous_attention_mask = prefix.cache.previous_attention_mask.expand(batch_size, -1)
    cache.entries = [copy(entry) for entry in prefix.cache.entries]
    for entry, single in zip(cache.entries, prefix.cache.entries, strict=True):
        entry.past_keys = single.past_keys.expand(batch_size, -1, -1, -1)
        entry.past_values = single.past_values.expand(batch_size, -1, -1, -1)
        single.__dict__.setdefault("memo", {})
        entry.memo = single.memo
    return cache
