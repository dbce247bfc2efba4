"""Contenders of `bench --task attribution` and `--task ablation`.

The plain ways are written with TransformerLens' own hooks on its own layout of the weights: one
pass per step of the integral, one full forward per head.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_headnorm.commands.attribute.attribute import Job, run_methods
from tl_headnorm.commands.attribute.gated_loss import GatedLoss
from tl_headnorm.commands.attribute.methods import quadrature
from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.commands.bench.contenders import Bench, Contender, Run, copied_model
from tl_headnorm.data.batches import Batch, batches_in_order
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names
from tl_headnorm.interventions import runner
from tl_headnorm.interventions.edits import Ablation
from tl_headnorm.interventions.heads import all_heads
from tl_headnorm.interventions.metrics import Letters
from tl_headnorm.settings import Settings

STEPS = 8
# Of the largest value: gradients of a narrow type are noisy, and so are small scores.
STUDY_TOLERANCE = {"fp64": 1e-6, "fp32": 2e-3, "fp16": 5e-2, "bf16": 0.2}
Gates = Float[Tensor, "row layer head"]


def answered(bench: Bench, samples: Sequence[Encoded]) -> tuple[list[Encoded], list[int]]:
    """The prompts with letters, and the right one's place: made up where the tokens are."""
    lettered = [s if s.letter_ids else replace(s, letter_ids=(3, 4, 5, 6)) for s in samples]
    return lettered, [bench.answers[s.index] if bench.answers else s.index % 4 for s in samples]


def plain_loss(bench: Bench, batch: Batch, answers: Sequence[int]) -> Callable[[Gates], Tensor]:
    """Every prompt's -log p(right letter) under its gates, by a stock TransformerLens forward.

    Rows of gates may repeat the batch, all prompts of one repetition together, as Captum has them.
    """
    tl, device = copied_model(bench).tl.requires_grad_(False), bench.model.device
    ids, mask = batch.ids.to(device), batch.mask.to(device)

    def loss(gates: Gates) -> Float[Tensor, " row"]:
        n = len(gates) // len(ids)

        def edit(z: Tensor, hook: Any) -> Tensor:
            return (z * gates[:, hook.layer()][:, None, :, None]).to(z.dtype)

        edits = [(hook_names.z(layer), edit) for layer in range(tl.cfg.n_layers)]
        real = mask.repeat(n, 1)
        logits = tl.run_with_hooks(ids.repeat(n, 1), attention_mask=real, fwd_hooks=edits)
        at = logits[torch.arange(len(real), device=device), real.sum(1) - 1].float()
        chosen = list(zip(batch.samples, answers, strict=True)) * n
        rows = [
            -row[list(sample.letter_ids)].log_softmax(0)[answer]
            for row, (sample, answer) in zip(at, chosen, strict=True)
        ]
        return torch.stack(rows)

    return loss


def _plain(key: str, attribute: Callable[[Any, Tensor], Tensor]) -> Callable[[Bench], Run]:
    """`attribute(loss, gates at 1)` gives [batch, layer, head], batch by batch in dataset order."""

    def open_run(bench: Bench) -> Run:
        info = bench.model.info

        def run(samples: Sequence[Encoded]) -> dict[str, np.ndarray]:
            lettered, answers = answered(bench, samples)
            right = {s.index: a for s, a in zip(lettered, answers, strict=True)}
            parts = []
            for batch in batches_in_order(lettered, bench.settings.batch_size, "right"):
                loss = plain_loss(bench, batch, [right[s.index] for s in batch.samples])
                shape = (len(batch.samples), info.n_layers, info.n_heads)
                ones = torch.ones(shape, device=bench.model.device)
                parts.append(attribute(loss, ones).detach().double().cpu().numpy())
            return {key: np.concatenate(parts)}

        return run

    return open_run


def loop_over_steps(loss: Callable[[Gates], Tensor], ones: Gates) -> Gates:
    """One pass per step, and the two end losses that a completeness error needs."""
    total = torch.zeros_like(ones)
    for node, weight in zip(*quadrature(STEPS), strict=True):
        gates = (ones * float(node)).requires_grad_()
        total += weight * torch.autograd.grad(loss(gates).sum(), gates)[0]
    with torch.no_grad():
        loss(ones)
        loss(0 * ones)
    return total


def by_captum(loss: Callable[[Gates], Tensor], ones: Gates) -> Gates:
    """Captum's integral over the same gates, all steps in one batch, with its two end losses."""
    from captum.attr import IntegratedGradients

    return IntegratedGradients(loss).attribute(
        ones, n_steps=STEPS, method="gausslegendre", return_convergence_delta=True
    )[0]


@torch.no_grad()
def loop_over_heads(loss: Callable[[Gates], Tensor], ones: Gates) -> Gates:
    """The loss with each head off, one full forward per head."""
    found = torch.empty_like(ones)
    for layer in range(ones.shape[1]):
        for head in range(ones.shape[2]):
            gates = ones.clone()
            gates[:, layer, head] = 0
            found[:, layer, head] = loss(gates)
    return found


def _our_integral(bench: Bench) -> Run:
    settings = AttributeSettings(
        methods=("ig_joint",), steps=STEPS, max_steps=STEPS, batch_size=bench.settings.batch_size
    )

    def run(samples: Sequence[Encoded]) -> dict[str, np.ndarray]:
        lettered, answers = answered(bench, samples)
        right = {s.index: a for s, a in zip(lettered, answers, strict=True)}
        gated = GatedLoss(bench.model, Letters(right), settings)
        found = run_methods(Job(gated, lettered, [], settings), ("ig_joint",))
        return {"ig_joint": found["ig_joint"].values}

    return run


def _our_sweep(bench: Bench) -> Run:
    info = bench.model.info
    heads = all_heads(range(info.n_layers), info.n_heads)
    ablations = [Ablation(f"{layer}.{head}", heads=((layer, head),)) for layer, head in heads]

    def run(samples: Sequence[Encoded]) -> dict[str, np.ndarray]:
        lettered, answers = answered(bench, samples)
        right = {s.index: a for s, a in zip(lettered, answers, strict=True)}
        settings = Settings(batch_size=bench.settings.batch_size)
        values = runner.run(bench.model, lettered, ablations, Letters(right), settings=settings)
        loss = np.asarray(values["loss"][1:]).T
        return {"loss": loss.reshape(len(samples), info.n_layers, info.n_heads)}

    return run


# The first of each is what the others' throughput is divided by.
STUDIES: dict[str, dict[str, Contender]] = {
    "attribution": {
        "tl_loop": Contender(_plain("ig_joint", loop_over_steps)),
        "captum": Contender(_plain("ig_joint", by_captum), lambda: find_spec("captum") is not None),
        "ours": Contender(_our_integral),
    },
    "ablation": {
        "tl_loop": Contender(_plain("loss", loop_over_heads)),
        "ours": Contender(_our_sweep),
    },
}
