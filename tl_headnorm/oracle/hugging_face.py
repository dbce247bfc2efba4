"""The oracle: the same numbers through Hugging Face's own forward and hooks.

Nothing of `engine` or `measures` is used here: z is the input of o_proj, the contributions are
formed as d_model vectors, and the last position is found another way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tl_headnorm.data.batches import Batch, batches_in_order
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.errors import InputError
from tl_headnorm.oracle import precision
from tl_headnorm.settings import Settings
from tl_headnorm.stats import Moments

# Largest accepted relative difference: (per sample, of the means).
TOLERANCE = {
    "fp64": (1e-5, 1e-5),  # Hugging Face keeps its norms and RoPE tables in float32
    "fp32": (1e-4, 1e-4),
    "fp16": (1e-2, 2e-3),
    "bf16": (2e-2, 2e-3),
}
NAMES = ("head_output_norm", "head_resid_contrib_norm")


# A family's list of layers, and in each the module whose input is z.
PLACES = {
    "GPT2LMHeadModel": ("transformer.h", "attn.c_proj"),
    "GPTNeoXForCausalLM": ("gpt_neox.layers", "attention.dense"),
}
USUAL_PLACE = ("model.layers", "self_attn.o_proj")


def output_projections(hf_model: PreTrainedModel) -> list[tuple[nn.Module, Tensor]]:
    """Per layer the module whose input is z, and its weight as [d_model, n_heads * d_head].

    Raises InputError for a model of another layout.
    """
    layers, output = PLACES.get(type(hf_model).__name__, USUAL_PLACE)
    try:
        modules = [block.get_submodule(output) for block in hf_model.get_submodule(layers)]
    except AttributeError:
        raise InputError(
            f"validate: expected the output projections of {type(hf_model).__name__} at "
            f"{layers}.*.{output}, found nothing there; use --validate_samples 0"
        ) from None
    # GPT-2's Conv1D holds [in, out], torch's Linear [out, in].
    return [(m, m.weight.T if type(m).__name__ == "Conv1D" else m.weight) for m in modules]


@contextmanager
def reading_z(hf_model: PreTrainedModel, on_layer: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `on_layer(layer, z)` with the input of every output projection while inside."""

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, args: on_layer(layer, args[0])

    handles = [
        module.register_forward_pre_hook(hook(layer))
        for layer, (module, _) in enumerate(output_projections(hf_model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_of_layer(
    z: Float[Tensor, "batch pos channel"], weight: Float[Tensor, "d_model channel"], n_heads: int
) -> tuple[Float[Tensor, "batch pos head"], Float[Tensor, "batch pos head"]]:
    """(||z_h||, ||z_h W_O^h||), each head's d_model vector formed in turn."""
    wide = torch.promote_types(z.dtype, torch.float32)
    pieces = z.to(wide).chunk(n_heads, dim=-1)
    columns = weight.to(wide).chunk(n_heads, dim=-1)
    output = torch.stack([piece.norm(dim=-1) for piece in pieces], dim=-1)
    contribution = torch.stack(
        [(piece @ w.T).norm(dim=-1) for piece, w in zip(pieces, columns, strict=True)], dim=-1
    )
    return output, contribution


@torch.inference_mode()
def batch_norms(
    hf_model: PreTrainedModel,
    batch: Batch,
    *,
    token_agg: str = "last",
    exclude_first_token: bool = False,
) -> dict[str, Float[np.ndarray, "batch layer head"]]:
    """Both norms of every head for one batch, by Hugging Face alone."""
    n_heads = hf_model.config.get_text_config().num_attention_heads
    ids, mask = batch.ids.to(hf_model.device), batch.mask.to(hf_model.device)
    real = mask.bool()
    weights = [weight for _, weight in output_projections(hf_model)]
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}

    def on_layer(layer: int, z: Tensor) -> None:
        if token_agg == "last":
            rows = [z[i, real[i].nonzero().max()] for i in range(len(z))]
            pair = norms_of_layer(torch.stack(rows)[:, None], weights[layer], n_heads)
            values = [norm[:, 0] for norm in pair]
        else:
            skip = int(exclude_first_token)
            pair = norms_of_layer(z, weights[layer], n_heads)
            values = [
                torch.stack([norm[i][real[i]][skip:].mean(0) for i in range(len(z))])
                for norm in pair
            ]
        for name, value in zip(NAMES, values, strict=True):
            found[name].append(value.to(ids.device))

    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with reading_z(hf_model, on_layer):
        hf_model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
    return {n: torch.stack(v, dim=1).double().cpu().numpy() for n, v in found.items()}


def measure_samples(
    hf_model: PreTrainedModel,
    samples: Sequence[Encoded],
    *,
    batch_size: int = 8,
    padding_side: str = "right",
    token_agg: str = "last",
    exclude_first_token: bool = False,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "sample layer head"]]:
    """Both norms of every head for every sample, in the order given."""
    batches = batches_in_order(samples, batch_size, padding_side)
    total = -(-len(samples) // batch_size)
    parts = [
        batch_norms(hf_model, batch, token_agg=token_agg, exclude_first_token=exclude_first_token)
        for batch in tqdm(
            batches, total=total, unit="batch", disable=not progress, desc="Hugging Face"
        )
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in NAMES}


def compare(
    found: Float[np.ndarray, "*any layer head"], reference: Float[np.ndarray, "*any layer head"]
) -> dict[str, Any]:
    """Worst |found - reference|, worst relative to |reference|, and where.

    A reference below float32's rounding of its layer's largest value counts as that rounding,
    so that a head that does nothing is not compared by its noise.
    """
    difference = np.abs(found - reference)
    floor = np.finfo(np.float32).eps * np.abs(reference).max(axis=-1, keepdims=True)
    scale = np.maximum(np.abs(reference), np.maximum(floor, np.finfo(np.float64).tiny))
    relative = difference / scale
    where = np.unravel_index(np.argmax(np.nan_to_num(relative, nan=np.inf)), relative.shape)
    return {
        "worst_absolute": float(difference.max()),
        "worst_relative": float(relative[where]),
        "layer": int(where[-2]),
        "head": int(where[-1]),
        **({"sample": int(where[0])} if len(where) == 3 else {}),
    }


def comparable(measures: Sequence[str]) -> list[str]:
    """Those of the measures that Hugging Face is asked for. Raises InputError for none."""
    found = [name for name in NAMES if name in measures]
    if not found:
        raise InputError(
            f"validate_samples: expected {NAMES[0]} or {NAMES[1]} to be measured, which Hugging "
            "Face is asked for, found neither; add one to --measures"
        )
    return found


def validate(
    model: Any,
    run: xr.Dataset,
    encoded: Sequence[Encoded],
    settings: Settings,
    limit: int = -1,
    *,
    reference_dtype: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Compare a run with Hugging Face on its first `limit` samples (-1: all).

    `encoded` are the prompts of the run, in its order. Returns, per measure, the worst
    differences per sample and of mean and std, each with its place, and `passed`: against the
    tolerance of the dtype or, in bf16 and fp16, by the errors of both against float32.
    """
    chosen = encoded if limit < 0 else encoded[:limit]
    names = comparable([str(name) for name in run.data_vars])
    how: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "padding_side": settings.padding_side,
        "token_agg": settings.token_agg,
        "exclude_first_token": settings.exclude_first_token,
        "progress": progress,
    }
    reference = measure_samples(model.hf, chosen, **how)
    per_sample, of_means = TOLERANCE[model.info.dtype]
    ours = {name: run[name].values[: len(chosen)].astype(np.float64) for name in names}
    measures = {name: _compare_measure(ours[name], reference[name]) for name in names}
    worst = max(entry["per_sample"]["worst_relative"] for entry in measures.values())
    worst_mean = max(entry["mean"]["worst_relative"] for entry in measures.values())
    report = {
        "n_samples": len(chosen),
        "dtype": model.info.dtype,
        "tolerance": {"per_sample": per_sample, "mean": of_means},
        "measures": measures,
        "worst_relative": worst,
        "passed": worst <= per_sample and worst_mean <= of_means,
    }
    if model.info.dtype in precision.NARROW and reference_dtype != "same":
        report["precision"] = _precision(model, ours, reference, chosen, how, reference_dtype)
        report["passed"] = report["passed"] or report["precision"].get("passed", False)
    return report


def _precision(
    model: Any,
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    encoded: Sequence[Encoded],
    how: dict[str, Any],
    reference_dtype: str,
) -> dict[str, Any]:
    """Errors of both against Hugging Face in float32, or a note that it found no room."""
    wide = precision.float32_copy(model.hf, anyway=reference_dtype == "fp32")
    if wide is None:
        return {"note": f"not compared with float32 (no memory for it): {model.info.dtype} alone"}
    exact = measure_samples(wide, encoded, **how)
    found = {n: precision.compare_errors(ours[n], theirs[n], exact[n]) for n in ours}
    return {
        "reference": "Hugging Face in float32 on the same weights",
        "factors": precision.FACTORS,
        "measures": found,
        "passed": all(entry["passed"] for entry in found.values()),
    }


def _compare_measure(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    a, b = Moments.of(ours), Moments.of(theirs)
    entry = {"per_sample": compare(ours, theirs), "mean": compare(a.mean, b.mean)}
    if len(ours) > 1:
        entry["std"] = compare(a.std(), b.std())
    return entry


def describe(report: dict[str, Any]) -> str:
    """The report as a few readable lines."""
    tolerance = report["tolerance"]
    lines = [
        f"{report['n_samples']:,} samples against Hugging Face in {report['dtype']}, tolerance "
        f"{tolerance['per_sample']:g} per sample and {tolerance['mean']:g} for the means"
    ]
    for name, entry in report["measures"].items():
        for what, found in entry.items():
            place = f"layer {found['layer']}, head {found['head']}"
            place += f", sample {found['sample']}" if "sample" in found else ""
            lines.append(
                f"  {name:<24} {what:<10} worst absolute {found['worst_absolute']:.2e}, "
                f"relative {found['worst_relative']:.2e} ({place})"
            )
    if "precision" in report:
        lines += precision.describe(report["precision"])
    lines.append("passed" if report["passed"] else "FAILED: beyond the tolerance")
    return "\n".join(lines)
