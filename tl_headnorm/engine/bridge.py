"""TransformerBridge as an engine, around a Hugging Face model that stays as it was.

TransformerBridge puts its own modules into the model it is given and wants eager attention. It
gets a twin: modules of its own on the same tensors.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.positions import real_tokens_last, take_position
from tl_headnorm.engine.protocol import (
    CachedPass,
    Engine,
    Hook,
    OnLayer,
    Pass,
    Prefix,
    Start,
    Tail,
    by_head,
    wide,
)
from tl_headnorm.errors import InputError, first_line


def twin(hf_model: Any) -> Any:
    """A copy of the modules and the config, with parameters of its own on the same tensors.

    No memory is taken, and a parameter of the twin may be given other data without the
    original's noticing. Tied parameters stay tied.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in hf_model.buffers()}
    memo |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in hf_model.parameters()}
    return copy.deepcopy(hf_model, memo)


def is_bridge(tl: Any) -> bool:
    return type(tl).__name__ == "TransformerBridge"


def build_bridge(hf_model: Any, tokenizer: Any) -> Any:
    """A TransformerBridge on the model's own tensors; the model itself is not touched.

    Raises InputError for an architecture the installed transformer-lens has no bridge for.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(hf_model).__name__
    inner = twin(hf_model)
    inner.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on settings that we make ourselves
            bridge = build_bridge_from_module(
                inner,
                architecture,
                hf_config=inner.config,
                tokenizer=None,  # a tokenizer given here would be changed
                device=hf_model.device,
                model_name=architecture,
            )
    except (ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"model: expected an architecture that TransformerBridge or HookedTransformer knows, "
            f"found {architecture} ({first_line(error)})"
        ) from error
    places = {p.device for p in inner.parameters()}
    bridge.cfg.n_devices = len(places)
    bridge.tokenizer = tokenizer
    return bridge.eval().requires_grad_(False)


@contextmanager
def stopping_before(bridge: Any, layer: int) -> Iterator[None]:
    """While inside, a forward pass ends before `layer`, and gives the residual there.

    `layer` n_layers: before the final norm.
    """
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(resid: Tensor, hook: Any) -> None:
        raise StopAtLayerException(resid)

    end = layer == bridge.cfg.n_layers
    with bridge.hooks(fwd_hooks=[("ln_final.hook_in" if end else f"blocks.{layer}.hook_in", stop)]):
        yield


@contextmanager
def beginning_at(bridge: Any, layer: int, resid: Tensor) -> Iterator[None]:
    """While inside, `resid` stands before `layer`, whatever the layers below it made.

    It is put in before the block's own hook points, so that all of them see it.
    """

    def put(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (resid.to(args[0].device), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": resid.to(kwargs["hidden_states"].device)}

    handle = bridge.blocks[layer].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class BridgeEngine(Engine):
    """A TransformerBridge: Hugging Face's modules with hook points, attention by the eager code.

    A prefix runs again with every batch, a late start runs the layers below it all the same, and
    no block is cut short.
    """

    shares_prefix = False
    starts_late = False

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
        rows, back = start, None
        if start.resid is None:
            assert start.ids is not None, "a pass begins at tokens or at a residual"
            self.check_length(mask.shape[1] + (len(prefix) if prefix else 0))
            ids, mask, back = _with_prefix(start.ids, mask, prefix)
            rows = Start(ids)
        with self.hooks(hooks):
            resid = _in_order(self._forward(rows, mask, stop), back)
        return take_position(resid, tail.last) if tail else resid

    def _forward(self, start: Start, mask: Tensor, stop: int | None = None) -> Tensor:
        ids, put = start.ids, cast("AbstractContextManager[None]", nullcontext())
        if start.resid is not None:  # any tokens: the residual takes their place
            ids, put = torch.zeros_like(mask), beginning_at(self.tl, start.layer, start.resid)
        with put, stopping_before(self.tl, self.n_layers if stop is None else stop):
            resid: Tensor = self.tl(ids, attention_mask=mask, use_cache=False)
        return resid.to(mask.device)

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
        names = {hook_names.z(layer): layer for layer in range(self.n_layers)}
        wanted = {*names, *extra}
        ids, mask, back = _with_prefix(ids, mask, prefix)
        with stopping_before(self.tl, self.n_layers):
            resid, cache = self.tl.run_with_cache(
                ids,
                attention_mask=mask,
                names_filter=lambda name: name in wanted,
                return_cache_object=False,
                output_attentions=False,  # else every layer's pattern is kept
                use_cache=False,
            )
        found = {name: _in_order(value.to(ids.device), back) for name, value in cache.items()}
        z = {la: by_head(found[name], self.n_heads) for name, la in names.items() if name in found}
        resid = _in_order(resid.to(ids.device), back)
        if tail and not tail.z_everywhere:
            z = {layer: take_position(value, tail.last) for layer, value in z.items()}
        if tail:
            resid = take_position(resid, tail.last)
        return Pass(z, resid, {name: found[name] for name in extra if name in found})

    def run_layers(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        on_layer: OnLayer,
        *,
        reads: Sequence[str] = ("z",),
        prefix: Prefix | None = None,
        tail: Tail | None = None,
        edits: bool = False,
    ) -> Float[Tensor, "batch resid_pos d_model"]:
        if set(reads) - {"z"}:
            raise InputError(
                f"measures: expected what reads z alone on a bridge, found "
                f"{', '.join(sorted(set(reads) - {'z'}))} to be read; use --engine hooked"
            )
        found = self.run_z(ids, mask, prefix=prefix, tail=tail)
        while found.z:
            on_layer(layer := next(iter(found.z)), {"z": found.z.pop(layer)})
        return found.resid

    def run_prefix(
        self,
        ids: Sequence[int],
        *,
        reads: Sequence[str] = ("z",),
        on_layer: OnLayer | None = None,
    ) -> Prefix:
        tokens = torch.tensor([list(ids)], device=self.device)
        return Prefix(tuple(ids), None, self.run_z(tokens, torch.ones_like(tokens)).z)

    def prefix_values(self, prefix: Prefix, layer: int) -> Float[Tensor, "1 pos kv_head d_head"]:
        raise NotImplementedError

    def cached_pass(self, n_rows: int) -> CachedPass:
        past: dict[str, Any] = {}

        def step(new: Tensor, mask: Tensor) -> Float[Tensor, "batch vocab"]:
            logits, past["past_key_values"] = self.tl(
                new,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :],
                use_cache=True,
                return_type="logits_and_cache",
                **past,
            )
            return wide(logits[:, -1].to(new.device))

        return step

    def head_sum_name(self, layer: int) -> str:
        return f"blocks.{layer}.attn.hook_out"


def _with_prefix(
    ids: Tensor, mask: Tensor, prefix: Prefix | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Full rows, without a gap between prefix and prompt, and the prompt's positions in them."""
    if prefix is None:
        return ids, mask, None
    head = torch.tensor(prefix.ids, device=ids.device).expand(len(ids), -1)
    rows, real = torch.cat([head, ids], 1), torch.cat([torch.ones_like(head), mask], 1)
    order = real_tokens_last(real)
    back = order.argsort(1)[:, len(prefix) :]
    return rows.gather(1, order), real.gather(1, order), back


def _in_order(x: Tensor, back: Tensor | None) -> Tensor:
    """x [batch, pos, ...] at the given positions of every row."""
    return x if back is None else x[torch.arange(len(x), device=x.device)[:, None], back]
