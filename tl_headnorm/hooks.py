"""The only file that names TransformerLens hook points: read z, edit z, score the last token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

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


def run_z(
    tl: Any,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    *,
    extra: Sequence[str] = (),
) -> tuple[ZByLayer, Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
    """z of every layer, the residual stream after the last block, and any `extra` activations.

    One forward pass by `run_with_cache`, filtered to `hook_z`; neither the final norm nor the
    unembedding is computed. A layer whose hook did not fire is missing from the result.
    """
    n_layers = tl.cfg.n_layers
    names = {z_name(layer): layer for layer in range(n_layers)}
    wanted = {*names, *extra}
    resid, cache = tl.run_with_cache(
        ids,
        attention_mask=mask,
        names_filter=lambda name: name in wanted,
        stop_at_layer=n_layers,
        return_cache_object=False,
    )
    z = {layer: cache[name] for name, layer in names.items() if name in cache}
    return z, resid, {name: cache[name] for name in extra if name in cache}


def letter_logits(
    tl: Any,
    resid: Float[Tensor, "batch pos d_model"],
    position: Int[Tensor, " batch"],
    letter_ids: Int[Tensor, "batch option"],
) -> Float[Tensor, "batch option"]:
    """Logits of a few tokens per prompt at one position; the rest is never unembedded.

    float32 or wider, so that ties of a narrow type do not choose the answer.
    """
    final = tl.ln_final(take_position(resid, position)).squeeze(1)
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
