"""Fingerprints of what a run's numbers depend on: a resumed run must find the same ones."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from tl_headnorm.data.plan import Planned
from tl_headnorm.data.prepare import Prepared
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.measures import Measure
from tl_headnorm.measures.measurer import MeasureOptions
from tl_headnorm.model.loading import Model
from tl_headnorm.run.log import Fingerprint

# Numbers read of every tensor: enough to know other weights by, too few to cost anything.
DRAWN = 4096


def of_run(
    model: Model, prepared: Prepared, options: MeasureOptions, plan: Sequence[Planned]
) -> dict[str, Fingerprint]:
    """Fingerprints of everything that a run's numbers depend on."""
    data, template = prepared.record["dataset"], prepared.record["template"]
    shape = {
        key: value
        for key, value in model.info.as_dict().items()
        if key not in ("source", "revision", "adapter")
    }
    source = " with ".join(filter(None, (model.info.source, model.info.adapter)))
    how = f"{options.token_agg} {options.exclude_first_token} {options.padding_side}"
    tokens = prompts(prepared.encoded, options.answers or ())
    names = ", ".join(measure.name for measure in options.measures)
    found = {
        "data": ("data_dir", "the questions' file", str(data["sha256"]), str(data["path"])),
        "shape": (
            "model_path", "the model's shape, data type and engine",
            _of_text(json.dumps(shape, sort_keys=True)), source,
        ),
        "config": ("model_path", "the model's config", config(model), source),
        "weights": ("model_path", "the model's weights", weights(model), source),
        "prompts": (
            "template", "the prompts' tokens and answers", tokens, f"template {template['name']}"
        ),
        "measures": ("measures", "the measures", measures(options.measures, how), names),
        "batches": ("batch_size", "the batches", batches(plan), f"{len(plan)} batches"),
    }  # fmt: skip
    return {name: Fingerprint(*parts) for name, parts in found.items()}


def of_runs(
    model: Model,
    samples: Sequence[Encoded],
    runs: Sequence[str],
    units: Sequence[tuple[Sequence[Encoded], Sequence[int]]],
) -> dict[str, Fingerprint]:
    """Fingerprints of samples under interventions, named by `runs` and done in these units."""
    source = " with ".join(filter(None, (model.info.source, model.info.adapter)))
    numbers = _of_numbers((*(s.index for s in some), -1, *numbers) for some, numbers in units)
    found = {
        "config": ("model_path", "the model's config", config(model), source),
        "weights": ("model_path", "the model's weights", weights(model), source),
        "prompts": (
            "template", "the prompts' tokens", prompts(samples, [0] * len(samples)),
            f"{len(samples)} prompts",
        ),
        "runs": ("seed", "the interventions", _of_text("\n".join(runs)), f"{len(runs)} runs"),
        "batches": ("batch_size", "the batches", numbers, f"{len(units)} units"),
    }  # fmt: skip
    return {name: Fingerprint(*parts) for name, parts in found.items()}


def measures(chosen: Sequence[Measure], options: str) -> str:
    """SHA-256 of the measures' formulas and of the user's own code."""
    digest = hashlib.sha256(options.encode())
    for measure in chosen:
        digest.update(f"{measure.name} {measure.formula} {measure.tokens}".encode())
        if measure.source is not None:
            digest.update(Path(measure.source).read_bytes())
    return digest.hexdigest()


def weights(model: Model) -> str:
    """SHA-256 over up to 4,096 numbers of every tensor, at places drawn once and for all.

    Other training, another merge or one head set to zero changes it; what it cannot tell is a
    change of a few single numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.hf.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_drawn(tensor.detach()).tobytes())
    return digest.hexdigest()


def _drawn(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.numel()
    flat = np.arange(size) if size <= DRAWN else np.random.default_rng(0).integers(size, size=DRAWN)
    # By coordinates: flattening a transposed view would copy the whole tensor.
    places = [
        torch.from_numpy(axis).to(tensor.device) for axis in np.unravel_index(flat, tensor.shape)
    ]
    found = tensor[tuple(places)] if places else tensor.reshape(1)
    return found.cpu().contiguous().view(torch.uint8).numpy()


def config(model: Model) -> str:
    """SHA-256 of the model's config, but for where it was read from and by which version."""
    known = model.hf.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "torch_dtype"):
        known.pop(key, None)
    return _of_text(json.dumps(known, sort_keys=True, default=str))


def prompts(samples: Sequence[Encoded], answers: Sequence[int]) -> str:
    """SHA-256 of every prompt's tokens, its letters' tokens and the right one among them."""
    return _of_numbers(
        (*sample.ids, -1, *sample.letter_ids, -1, answer)
        for sample, answer in zip(samples, answers, strict=True)
    )


def batches(plan: Sequence[Planned]) -> str:
    """SHA-256 of which prompts run together, and after which common beginning."""
    return _of_numbers((*(s.index for s in p.samples), -1, p.group.prefix_length) for p in plan)


def _of_numbers(rows: Iterable[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array(row, dtype="<i8").tobytes())
    return digest.hexdigest()


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
