"""Joint integrated gradients against a loop over steps: equal values, measured ratio.

Run with `pytest tests/test_attribution_speed.py -s -m slow` for the figure at 8 steps and 64
samples; the tests always compare the values.
"""

import copy
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from tl_headnorm import fast, points
from tl_headnorm.config.attribute import AttributeSettings
from tl_headnorm.data.questions import load_questions
from tl_headnorm.model import load_model
from tl_headnorm.studies.attribution.methods import quadrature
from tl_headnorm.studies.attribution.study import open_job, run_methods

TINY = ROOT / "tl_headnorm" / "tiny"


def open_tiny(n):
    model = load_model(TINY / "model", dtype="fp32", device_map="cpu")
    questions = load_questions("multiple_choice", TINY / "questions" / "test.jsonl", max_samples=n)
    settings = AttributeSettings(methods=("ig_joint",), steps=8, max_steps=8, tolerance=1e9)
    return open_job(model, questions, settings)


def gated_loss(tl, batch):
    """The loss of a batch as a function of its gates, written with TransformerLens alone."""
    width = max(map(len, batch))
    ids = torch.tensor([list(i.ids) + [0] * (width - len(i)) for i in batch])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in batch])
    last = torch.tensor([len(i) - 1 for i in batch])

    def loss(gates):
        def edit(z, hook):
            return z * gates[:, hook.layer()][:, None, :, None]

        n = len(gates) // len(batch)  # captum stacks the steps: all rows of one step together
        hooks = [(points.z(layer), edit) for layer in range(tl.cfg.n_layers)]
        rows, real = ids.repeat(n, 1), mask.repeat(n, 1)
        logits = tl.run_with_hooks(rows, attention_mask=real, fwd_hooks=hooks)
        at = logits[torch.arange(len(rows)), last.repeat(n)]
        found = [
            -row[list(i.letter_ids)].log_softmax(0)[i.answer]
            for row, i in zip(at, list(batch) * n, strict=True)
        ]
        return torch.stack(found)

    return loss


def in_batches(tl, items, attribute, size=8):
    shape = (tl.cfg.n_layers, tl.cfg.n_heads)
    parts = []
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        loss = gated_loss(tl, batch)
        parts.append(attribute(loss, torch.ones(len(batch), *shape)))
    return torch.cat(parts).double().numpy()


def loop_over_steps(tl, items, steps=8):
    """One pass per step, and the two end losses that a completeness error needs."""
    nodes, weights = quadrature(steps)

    def attribute(loss, ones):
        total = torch.zeros_like(ones)
        for node, weight in zip(nodes, weights, strict=True):
            gates = (ones * float(node)).requires_grad_()
            total += weight * torch.autograd.grad(loss(gates).sum(), gates)[0]
        with torch.no_grad():
            loss(ones), loss(0 * ones)
        return total

    return in_batches(tl, items, attribute)


def by_captum(tl, items, steps=8):
    """Captum's own integral over the same gates, with its convergence delta."""
    from captum.attr import IntegratedGradients

    def attribute(loss, ones):
        return IntegratedGradients(loss).attribute(
            ones, n_steps=steps, method="gausslegendre", return_convergence_delta=True
        )[0]

    return in_batches(tl, items, attribute)


def stock_layout(model):
    """The same model as TransformerLens itself holds one: its own layout, its own forward."""
    tl = copy.deepcopy(model.tl)
    fast.uninstall(tl)
    for parameter in tl.parameters():
        parameter.data = parameter.data.contiguous()
    return tl


def compare(n, repeats=1):
    """CPU seconds of this process, the least of `repeats`; equal values are asserted."""
    work = open_tiny(n)
    plain = copy.deepcopy(work.engine.model.tl)
    fast.uninstall(plain)
    stock = stock_layout(work.engine.model)
    contenders = {
        "ours": lambda: run_methods(work, ("ig_joint",))["ig_joint"].values,
        "loop over steps": lambda: loop_over_steps(stock, work.items),
        "loop over steps, our weight layout": lambda: loop_over_steps(plain, work.items),
        "captum": lambda: by_captum(stock, work.items),
    }
    seconds = dict.fromkeys(contenders, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other count as busy
    for _ in range(repeats):
        values = {}
        for name, run in contenders.items():
            start = time.process_time()
            values[name] = run()
            seconds[name] = min(seconds[name], time.process_time() - start)
        for name, value in values.items():
            # float32 where the loss is steep in the gates; captum adds its steps up otherwise.
            bound = 2e-3 * np.abs(value).max()
            np.testing.assert_allclose(values["ours"], value, atol=bound, err_msg=name)
    torch.set_num_threads(threads)
    return seconds


def test_equal_values():
    compare(3)


@pytest.mark.slow
def test_faster_than_a_loop_and_captum():
    seconds = compare(64)
    print("\n8 steps, 64 samples, CPU seconds and their ratio to ours:")
    for name, value in seconds.items():
        print(f"  {name}: {value:.2f} s, {value / seconds['ours']:.2f}")
    assert seconds["loop over steps"] > 1.3 * seconds["ours"]
