"""Gates on heads: z_h becomes base_h + gate * (z_h - base_h) at every position.

Part of the hooks layer. Passes may begin at any layer from a residual stream kept earlier, and take
a row of gates per batch row, so that many settings of the gates run in one batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_headnorm import points
from tl_headnorm.fast import Tail, stopping_at
from tl_headnorm.hooks import to_last_block
from tl_headnorm.measures import take_position

GateRows = Float[Tensor, "#row layer head"]
# Per layer, what a head's z becomes at gate 0: the same everywhere, or one per row and position.
Base = Mapping[int, Shaped[Tensor, "#row #pos head d_head"]]


def _gate_hook(gate: Float[Tensor, "_ head"], base: Tensor | None, last: Tensor | None) -> Any:
    factor = gate[:, None, :, None]

    def edit(z: Tensor, hook: Any) -> Tensor:
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
    start: Shaped[Tensor, "row pos ..."],
    mask: Int[Tensor, "row pos"],
    gates: GateRows,
    layers: Iterable[int],
    *,
    start_layer: int = 0,
    base: Base | None = None,
    tail: Tail | None = None,
    keep: Sequence[int] = (),
) -> tuple[Float[Tensor, "row resid_pos d_model"], dict[int, Tensor]]:
    """(residual after the last block, residual before each layer in `keep`).

    `start` are token ids, or with `start_layer` > 0 the residual before that layer. Only the
    gates of `layers` act; those below `start_layer` have acted already. With a `tail` the
    residual is [row, 1, d_model], at the last real position alone.
    """
    last = tail.last if tail else None
    kept: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def keep_it(resid: Tensor, hook: Any) -> None:
            kept[layer] = resid

        return keep_it

    edits = [
        (points.z(layer), _gate_hook(gates[:, layer], None if base is None else base[layer], last))
        for layer in layers
        if layer >= start_layer
    ]
    readers = [(points.resid_pre(layer), keeper(layer)) for layer in keep]
    with (
        stopping_at(tl, tail) if tail else nullcontext(False) as shortened,
        tl.hooks(fwd_hooks=[*edits, *readers]),
    ):
        resid = to_last_block(tl, start, mask, start_layer=start_layer)
    if last is not None and not shortened:
        resid = take_position(resid, last)
    return resid, kept


def patterns(
    tl: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> list[Float[Tensor, "batch head q k"]]:
    """Attention weights of every layer."""
    names = [points.pattern(layer) for layer in range(tl.cfg.n_layers)]
    _, found = tl.run_with_cache(
        ids,
        attention_mask=mask,
        names_filter=lambda name: name in names,
        stop_at_layer=tl.cfg.n_layers,
        return_cache_object=False,
    )
    return [found[name] for name in names]


def z_of(
    tl: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> dict[int, Float[Tensor, "batch pos head d_head"]]:
    """z of every layer at every position."""
    names = {points.z(layer): layer for layer in range(tl.cfg.n_layers)}
    _, found = tl.run_with_cache(
        ids,
        attention_mask=mask,
        names_filter=lambda name: name in names,
        stop_at_layer=tl.cfg.n_layers,
        return_cache_object=False,
    )
    return {names[name]: z for name, z in found.items()}
