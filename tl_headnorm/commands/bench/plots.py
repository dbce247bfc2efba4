"""The bench's figure: throughput of every contender over the bare forward pass's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_headnorm.plots.colors import GREY, PALETTE
from tl_headnorm.plots.panel import Figure, Panel, Series


def bars(report: Mapping[str, Any]) -> Figure:
    """Horizontal bars with the range over the repeats; ours in colour."""
    rows = report["contenders"]
    base = rows.get(report["base"])
    unit = base["samples_per_second"] if base else 1.0
    series = []
    for ours in (True, False):
        at = [i for i, name in enumerate(rows) if name.startswith("ours") == ours]
        some = [list(rows.values())[i] for i in at]
        values = np.array([row["samples_per_second"] for row in some]) / unit
        low, high = np.array([row["spread"] for row in some]).reshape(-1, 2).T / unit
        color, labels = PALETTE[0] if ours else GREY, [f"{v:.2f}" for v in values]
        series.append(Series("", values, at, color, "bars", low, high, labels=labels, legend=False))
    one = "bare forward pass" if report["base"] == "hf_forward" else report["base"]
    work, machine = report["workload"], report["machine"]
    panel = Panel(
        x=f"throughput, {one} = 1" if base else "samples per second", series=series,
        horizontal=True, y_ticks=dict(enumerate(rows)), size=(5.2, 0.5 + 0.3 * len(rows)),
    )  # fmt: skip
    title = (
        f"{work['samples']} prompts, {work['model']['n_layers']} layers, "
        f"{work['model']['dtype']}, batch {work['batch_size']}"
    )
    return Figure(title, [panel], 1, f"{machine.get('gpu', machine['cpu'])}, "
                                     f"{machine['threads']} threads")  # fmt: skip
