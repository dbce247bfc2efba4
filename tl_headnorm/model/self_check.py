"""Self-check of a loaded model against Hugging Face on a probe."""

import math
from collections.abc import Mapping

import torch
from einops import einsum
from torch import Tensor

from tl_headnorm.engine.protocol import Engine
from tl_headnorm.errors import InputError
from tl_headnorm.model.loading import Model

# Largest accepted |difference| / max|reference|: a few hundred roundings of the type.
TOLERANCE = {
    # Hugging Face keeps its norms and RoPE tables in float32 even here.
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
PROBE_LENGTH = 8


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """max|found - reference| / max|reference|."""
    wide = torch.promote_types(reference.dtype, torch.float32)
    scale = reference.to(wide).abs().max().clamp_min(torch.finfo(wide).tiny)
    return float((found.to(wide) - reference.to(wide)).abs().max() / scale)


@torch.no_grad()
def check_model(model: Model) -> dict[str, float]:
    """Compare with Hugging Face on a probe, row 0 full and row 1 left-padded.

    Raises InputError unless: all numbers are finite; logits equal Hugging Face's; in every layer
    sum_h z_h W_O^h + b_O = attn_out; and zeroing the head that contributes most changes the
    logits. Returns the relative differences found.
    """
    engine, tolerance = model.engine, TOLERANCE[model.hf.dtype]
    ids, mask = _probe(model)
    names = [engine.head_sum_name(layer) for layer in range(engine.n_layers)]
    seen = engine.run_z(ids, mask, extra=names)
    z, resid, attn_out = seen.z, seen.resid, seen.extra
    logits = engine.logits(resid[:, -1:])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    # All positions, not logits_to_keep=1: a strided slice takes the CPU's unembedding 4 seconds.
    reference = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1:]
    found = {"logits": relative_difference(logits, reference)}
    parts = [_head_sum(engine, z[layer], layer) for layer in z]
    real = mask.bool()
    found["attn_out"] = max(
        relative_difference(total[real], attn_out[name][real])
        for total, name in zip(parts, names, strict=True)
    )
    if not all(map(math.isfinite, found.values())):
        raise InputError(
            f"self_check: expected finite numbers, found {not_finite(model, z)} "
            "(--self_check false loads it all the same)"
        )
    for what, value in found.items():
        if not value <= tolerance:
            raise InputError(
                f"self_check: expected {what} within {tolerance:g} of Hugging Face's, found "
                f"{value:.2g}; this model cannot be measured faithfully "
                "(--self_check false loads it all the same)"
            )
    _check_causal(engine, z, ids, mask, resid)
    return found


def not_finite(model: Model, z: Mapping[int, Tensor]) -> str:
    """The first layer and heads with NaN or infinity, and the weights they come from."""
    tensor = next((n for n, p in model.hf.named_parameters() if not p.isfinite().all()), None)
    why = f"the tensor {tensor} holds such numbers: mend the weights"
    if tensor is None:
        why = "the weights are finite, so the data type is too narrow: try --dtype fp32 or bf16"
    for layer in sorted(z):
        of_heads = [z[layer].isfinite().all(-1).all(1).all(0),
                    model.engine.W_O(layer).isfinite().all(-1).all(-1)]  # fmt: skip
        for finite in of_heads:
            heads = torch.nonzero(~finite).flatten().tolist()
            if heads:
                return f"NaN or infinity in layer {layer}, head {_several(heads)}; {why}"
    return f"NaN or infinity outside the attention heads; {why}"


def _several(heads: list[int]) -> str:
    shown = ", ".join(map(str, heads[:4]))
    return shown if len(heads) <= 4 else f"{shown} and {len(heads) - 4} more"


def _probe(model: Model) -> tuple[Tensor, Tensor]:
    """Two rows of spread-out token ids, the second one padded on the left."""
    length = min(PROBE_LENGTH, model.n_ctx)
    vocabulary = model.engine.cfg.d_vocab
    ids = (torch.arange(1, length + 1) * 7919 % vocabulary).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    return ids.to(model.device), mask.to(model.device)


def _head_sum(engine: Engine, z: Tensor, layer: int) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    W_O, b_O = engine.W_O(layer).to(wide), engine.b_O(layer).to(wide)
    return einsum(z.to(wide), W_O, "b p h d, h d m -> b p m") + b_O


def _check_causal(
    engine: Engine, z: Mapping[int, Tensor], ids: Tensor, mask: Tensor, resid: Tensor
) -> None:
    """The hook must cut the model, not watch it: zeroing the strongest head changes the output."""
    layer = max(z)
    sizes = einsum(
        z[layer][:, -1].float(), engine.W_O(layer).float(), "b h d, h d m -> b h m"
    ).norm(dim=-1)
    head = int(sizes[0].argmax())
    with engine.zero_heads([(layer, head)]):
        edited = engine.run_z(ids, mask).resid
    if torch.equal(edited[:, -1], resid[:, -1]):
        raise InputError(
            f"self_check: expected zeroing head {layer}.{head} to change the output, found no "
            "change; the hooks do not reach this model's computation"
        )
