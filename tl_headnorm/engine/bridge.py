"""TransformerBridge as an engine, around a Hugging Face model that stays as it was.

TransformerBridge puts its own modules into the model it is given and wants eager attention. It
gets a twin: modules of its own on the same tensors.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_headnorm.engine import hook_names, short_attention
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
    by_head,
    layer_readers,
    wide,
)
from tl_headnorm.errors import InputError, first_line

NO_CACHE = {"use_cache": False}


def twin(hf_model: Any) -> Any:
    """A copy of the modules and the config, with parameters of its own on the same tensors.

    No memory is taken, and a parameter of the twin may be given other data without the
    original's noticing. Tied parameters stay tied.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in hf_model.buffers()}
    memo |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in hf_model.parameters()}
    return copy.deepcopy(hf_model, memo)


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
    short_attention.install(bridge)
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
def stopping_after_last_z(bridge: Any) -> Iterator[None]:
    """While inside, a forward pass ends with the last layer's W_O."""
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(module: Any, args: Any, output: Tensor) -> None:
        raise StopAtLayerException(output)

    handle = bridge.blocks[bridge.cfg.n_layers - 1].attn.o.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


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


@contextmanager
def skipping_below(bridge: Any, layer: int, n_outputs: int) -> Iterator[None]:
    """While inside, the blocks below `layer` give their input back; nothing of them is computed.

    `n_outputs`: length of the tuple that a block returns, 0 for a bare tensor.
    """

    def give_back(*args: Any, **kwargs: Any) -> Any:
        resid = args[0] if args else kwargs["hidden_states"]
        return (resid, *[None] * (n_outputs - 1)) if n_outputs else resid

    skipped = list(bridge.blocks)[:layer]
    for block in skipped:  # past torch's and the bridge's own __setattr__
        object.__setattr__(block, "forward", give_back)
    try:
        yield
    finally:
        for block in skipped:
            object.__delattr__(block, "forward")


@dataclass(frozen=True)
class _Rows:
    """Rows as the bridge runs them, and where the caller's positions are in them.

    With a prefix real tokens come first: a gap of padding behind the prefix would be felt by a
    sliding window. `queries` and `keys` are None where rows and positions are the caller's own.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch key"]
    cache: dict[str, Any] = field(default_factory=dict)
    queries: Int[Tensor, "batch caller_pos"] | None = None
    keys: Int[Tensor, "batch caller_key"] | None = None

    def index(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """Index of the caller's positions in an activation of this name."""
        assert self.queries is not None, "asked of rows that are not the caller's"
        assert self.keys is not None, "asked of rows that are not the caller's"
        queries, row = self.queries.to(x.device), torch.arange(len(x), device=x.device)
        if not name.endswith(("hook_pattern", "hook_attn_scores")):
            return row[:, None], queries
        head = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        keys = self.keys.to(x.device)[:, None, None, :]
        return row[:, None, None, None], head, queries[:, None, :, None], keys

    def of_caller(self, name: str, x: Tensor) -> Tensor:
        """An activation at the caller's positions, on the device of the ids."""
        found = x if self.queries is None else x[self.index(name, x)]
        return found.to(self.ids.device)

    def put_back(self, name: str, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` at the caller's positions."""
        new = new.to(x.device)
        return new.reshape(x.shape) if self.queries is None else self._put(name, x, new)

    def _put(self, name: str, x: Tensor, new: Tensor) -> Tensor:
        index = self.index(name, x)
        return x.index_put(index, new.reshape(x[index].shape))


class BridgeEngine(Engine):
    """A TransformerBridge: Hugging Face's modules with hook points, attention by the eager code.

    The last block computes every position, or nothing behind its z.
    """

    def __init__(self, tl: Any) -> None:
        self.tl = tl
        # Length of the tuple that a block returns, 0 for a bare tensor: noted in the first pass.
        self._n_outputs: int | None = None

    @property
    def _config(self) -> Any:
        return self.tl.original_model.config.get_text_config()

    @property
    def shares_prefix(self) -> bool:  # type: ignore[override]
        """Not where a layer keeps a state that is no list of keys and values."""
        kinds = set(getattr(self._config, "layer_types", None) or ())
        return self.starts_late and kinds <= {"full_attention", "sliding_attention"}

    @property
    def starts_late(self) -> bool:  # type: ignore[override]
        """Not where a later layer reads what an earlier one computed (Gemma 3n)."""
        return not getattr(self._config, "num_kv_shared_layers", 0)

    @property
    def splits_blocks(self) -> bool:
        """Norms after attention or MLP, and scaled additions, are the model's own code."""
        return False

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
        # Where a pass starts at a residual, any tokens do.
        ids = torch.zeros_like(mask) if start.ids is None else start.ids
        if start.resid is None:
            self.check_length(mask.shape[1] + (len(prefix) if prefix else 0))
        rows = self._rows(ids, mask, prefix)
        with self.hooks([self._for_rows(hook, rows) for hook in hooks]):
            resid = self._forward(rows, start, tail, stop)
        return take_position(resid, tail.last) if tail else resid

    def _for_rows(self, hook: Hook, rows: _Rows) -> Hook:
        """A hook that is given the caller's positions, and z with a head axis."""
        name, function = hook

        def adapted(value: Tensor, hook: Any) -> Tensor | None:
            shaped = by_head(value, self.n_heads) if name.endswith("hook_z") else value
            new = function(rows.of_caller(name, shaped), hook)
            return None if new is None else rows.put_back(name, shaped, new).reshape(value.shape)

        return name, adapted

    def _forward(
        self, rows: _Rows, start: Start, tail: Tail | None = None, stop: int | None = None
    ) -> Tensor:
        with ExitStack() as stack:
            if start.resid is not None:
                stack.enter_context(beginning_at(self.tl, start.layer, start.resid))
                if self._n_outputs is not None and self.starts_late:
                    stack.enter_context(skipping_below(self.tl, start.layer, self._n_outputs))
            self._end(stack, tail, stop)
            resid = self.tl(rows.ids, attention_mask=rows.mask, **(rows.cache or NO_CACHE))
        return rows.of_caller("", resid)

    def _end(self, stack: ExitStack, tail: Tail | None, stop: int | None = None) -> None:
        """Where the passes inside `stack` end; the first of all notes what a block returns."""
        if tail is not None and not tail.resid:
            stack.enter_context(stopping_after_last_z(self.tl))
        else:
            stack.enter_context(stopping_before(self.tl, self.n_layers if stop is None else stop))
        if self._n_outputs is None:

            def note(block: Any, args: Any, output: Any) -> None:
                self._n_outputs = len(output) if isinstance(output, tuple) else 0

            stack.callback(self.tl.blocks[0].register_forward_hook(note).remove)

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
        found = self._cached(self._rows(ids, mask, prefix), tail, extra)
        z, resid = found.z, found.resid
        if tail and not tail.z_everywhere:
            z = {layer: take_position(value, tail.last) for layer, value in z.items()}
        return Pass(z, take_position(resid, tail.last) if tail else resid, found.extra)

    def _cached(self, rows: _Rows, tail: Tail | None = None, extra: Sequence[str] = ()) -> Pass:
        """`run_with_cache` filtered to hook_z and `extra`, up to the last block."""
        names = {hook_names.z(layer): layer for layer in range(self.n_layers)}
        wanted = {*names, *extra}
        with ExitStack() as stack:
            self._end(stack, tail)
            resid, cache = self.tl.run_with_cache(
                rows.ids,
                attention_mask=rows.mask,
                names_filter=lambda name: name in wanted,
                return_cache_object=False,
                output_attentions=False,  # else every layer's pattern is kept
                **(rows.cache or NO_CACHE),
            )
        found = {name: rows.of_caller(name, value) for name, value in cache.items()}
        z = {la: by_head(found[name], self.n_heads) for name, la in names.items() if name in found}
        extras = {name: found[name] for name in extra if name in found}
        return Pass(z, rows.of_caller("", resid), extras)

    def run_prefix(
        self,
        ids: Sequence[int],
        *,
        reads: Sequence[str] = ("z",),
        on_layer: OnLayer | None = None,
    ) -> Prefix:
        from transformers import DynamicCache

        self.check_length(len(ids))
        tokens = torch.tensor([list(ids)], device=self.device)
        cache = DynamicCache() if self.shares_prefix else None
        past = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        rows, z = _Rows(tokens, torch.ones_like(tokens), past), ZByLayer()
        if set(reads) == {"z"}:
            z = self._cached(rows).z
            while on_layer and z:
                on_layer(layer := next(iter(z)), {"z": z.pop(layer)})
        else:
            report = on_layer or (lambda layer, read: z.__setitem__(layer, read["z"]))
            readers = layer_readers(self.n_layers, reads, report)
            with self.hooks([self._for_rows(hook, rows) for hook in readers]):
                self._forward(rows, Start(tokens))
        return Prefix(tuple(ids), cache, z)

    def _rows(self, ids: Tensor, mask: Tensor, prefix: Prefix | None) -> _Rows:
        """The rows of a pass behind a prefix: by its cache, else with its tokens before each."""
        if prefix is None:
            return _Rows(ids, mask)
        n = len(prefix)
        head = torch.tensor(prefix.ids, device=ids.device).expand(len(ids), -1)
        if prefix.cache is None:
            ids, mask = torch.cat([head, ids], 1), torch.cat([torch.ones_like(head), mask], 1)
        order = torch.argsort(1 - mask, dim=1, stable=True)
        ids, mask, places = ids.gather(1, order), mask.gather(1, order), order.argsort(1)
        if prefix.cache is None:
            return _Rows(ids, mask, {}, places[:, n:], places)
        past = {"past_key_values": _expanded(prefix.cache, len(ids)), "use_cache": True}
        before = torch.arange(n, device=ids.device).expand(len(ids), -1)
        keys = torch.cat([before, places + n], 1)
        return _Rows(ids, torch.cat([torch.ones_like(head), mask], 1), past, places, keys)

    def prefix_values(self, prefix: Prefix, layer: int) -> Float[Tensor, "1 pos kv_head d_head"]:
        values: Tensor = prefix.cache.layers[layer].values
        return values.transpose(1, 2).to(self.device)

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

    @property
    def final_norm(self) -> FinalNorm:
        norm = self.tl.ln_final
        centred = not norm.uses_rms_norm
        offset = not centred and getattr(self.cfg, "rmsnorm_uses_offset", False)  # Gemma: 1 + w
        return FinalNorm(norm.original_component.weight + int(offset), self.cfg.eps, centred)

    @property
    def logit_factor(self) -> float:
        config = self._config
        return float(getattr(config, "logit_scale", None) or 1) / float(
            getattr(config, "logits_scaling", None) or 1
        )

    def head_sum_name(self, layer: int) -> str:
        return f"blocks.{layer}.attn.hook_out"


def _expanded(cache: Any, n_rows: int) -> Any:
    """A prefix's cache for every row of a batch; nothing is copied, and it stays as it is."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        layer.keys = layer.keys.expand(n_rows, -1, -1, -1)
        layer.values = layer.values.expand(n_rows, -1, -1, -1)
    return found
