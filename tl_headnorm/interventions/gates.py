"""Gates on heads: z_h becomes base_h + gate * (z_h - base_h) at every position.

Part of the hooks layer. Passes may begin at any layer from what an earlier pass kept of it, and
take a row of gates per batch row, so that many settings of the gates run in one batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.protocol import Start, Tail
from tl_headnorm.engine.select import engine_of
from tl_headnorm.interventions import edits
from tl_headnorm.measures import take_position

GateRows = Float[Tensor, "#row layer head"]
# Per layer, what a head's z becomes at gate 0: the same everywhere, or one per row and position.
Base = Mapping[int, Shaped[Tensor, "#row #pos head d_head"]]


@dataclass(frozen=True)
class Before:
    """What a layer's gates act on: the residual before it, and its z where a pass may begin there.

    Gates of the layer itself change neither, so both serve any setting of them.
    """

    resid: Float[Tensor, "row pos d_model"]
    z: Float[Tensor, "row z_pos head d_head"] | None = None

    def rows(self, at: Int[Tensor, " chosen"]) -> "Before":
        return Before(self.resid[at], None if self.z is None else self.z[at])


def _gate(
    gate: Float[Tensor, "_ head"], base: Tensor | None, last: Tensor | None
) -> Callable[[Tensor], Tensor]:
    factor = gate[:, None, :, None]

    def edit(z: Tensor) -> Tensor:
        # Gates are float32 or wider: the product is rounded once, to the model's type.
        if base is None:
            return (z * factor).to(z.dtype)
        at = base
        if last is not None and at.shape[1] not in (1, z.shape[1]):
            at = take_position(at, last)
        return (z + (1 - factor) * (at - z)).to(z.dtype)

    return edit


def run_gated(
    tl: Any,
    start: Int[Tensor, "row pos"] | Before,
    mask: Int[Tensor, "row pos"],
    gates: GateRows,
    layers: Iterable[int],
    *,
    start_layer: int = 0,
    base: Base | None = None,
    tail: Tail | None = None,
    keep: Sequence[int] = (),
) -> tuple[Float[Tensor, "row resid_pos d_model"], dict[int, Before]]:
    """(residual after the last block, what the gates of each layer in `keep` act on).

    `start` are token ids, or what an earlier pass kept of `start_layer`. Only the gates of
    `layers` act; those below `start_layer` have acted already. With a `tail` the residual is
    [row, 1, d_model], at the last real position alone.
    """
    last = tail.last if tail else None
    acting = {
        layer: _gate(gates[:, layer], None if base is None else base[layer], last)
        for layer in layers
        if layer >= start_layer
    }
    if isinstance(start, Before) and start.z is not None:
        resid = _behind(tl, start_layer, start.resid, start.z, acting.pop(start_layer, None), last)
        start_layer += 1
        if start_layer == tl.cfg.n_layers:
            return resid, {}
        begin = Start(layer=start_layer, resid=resid)
    elif isinstance(start, Before):
        begin = Start(layer=start_layer, resid=start.resid)
    else:
        begin = Start(ids=start)
    resids: dict[int, Tensor] = {}
    zs: dict[int, Tensor] = {}
    readers = edits.read_resid(keep, False, resids.__setitem__)
    if engine_of(tl).splits_blocks:
        readers += edits.read_z(keep, zs.__setitem__)
    hooks = [*readers, *((hook_names.z(layer), _as_hook(edit)) for layer, edit in acting.items())]
    resid = engine_of(tl).run(begin, mask, hooks, tail=tail)
    return resid, {layer: Before(resids[layer], zs.get(layer)) for layer in keep}


def _as_hook(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    return lambda z, hook: edit(z)


def _behind(
    tl: Any,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    z: Float[Tensor, "row z_pos head d_head"],
    edit: Callable[[Tensor], Tensor] | None,
    last: Tensor | None,
) -> Float[Tensor, "row resid_pos d_model"]:
    """The residual after a layer whose z is known, at the last real position if it is the end."""
    if last is not None and layer == tl.cfg.n_layers - 1:
        resid = take_position(resid, last)
        z = z if z.shape[1] == 1 else take_position(z, last)
    resid = engine_of(tl).add_heads(layer, resid, z if edit is None else edit(z))
    return resid if tl.cfg.attn_only else resid + engine_of(tl).mlp(layer, resid)


def _cached(
    tl: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], name: Any
) -> dict[int, Tensor]:
    """An activation of every layer, by a forward that computes nothing behind the last block."""
    layers = {name(layer): layer for layer in range(tl.cfg.n_layers)}
    _, found = tl.run_with_cache(
        ids,
        attention_mask=mask,
        names_filter=lambda point: point in layers,
        stop_at_layer=tl.cfg.n_layers,
        return_cache_object=False,
    )
    return {layer: found[point] for point, layer in layers.items()}


def patterns(
    tl: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> list[Float[Tensor, "batch head q k"]]:
    """Attention weights of every layer."""
    return list(_cached(tl, ids, mask, hook_names.pattern).values())


def z_of(
    tl: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> dict[int, Float[Tensor, "batch pos head d_head"]]:
    """z of every layer at every position."""
    return _cached(tl, ids, mask, hook_names.z)
