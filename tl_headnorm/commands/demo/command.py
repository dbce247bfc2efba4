"""`demo`: collect on the built-in model, and what it found in a few lines."""

from pathlib import Path

import numpy as np
import xarray as xr

from tl_headnorm.commands.collect.command import Draw, run_collect
from tl_headnorm.commands.demo.settings import DemoSettings
from tl_headnorm.run.loading import say
from tl_headnorm.run.reading import load_run
from tl_headnorm.settings import Settings

SHADES = " ░▒▓█"


def run_demo(settings: DemoSettings, draw: Draw) -> Path:
    """Collect on builtin:tiny over builtin:questions, checked against Hugging Face; its path."""
    say("The built-in model answers its held-out questions; every head is measured.\n")
    path = run_collect(
        Settings(
            model_path="builtin:tiny",
            dataset="builtin:questions",
            dtype="fp32",
            device_map=settings.device_map,
            token_agg=settings.token_agg,
            validate_samples=settings.validate_samples,
            output_dir=settings.output_dir,
            experiment_name="demo",
        ),
        draw,
    )
    assert path is not None  # one process alone writes it
    say(describe(load_run(path), path))
    return path


def describe(run: xr.Dataset, path: Path) -> str:
    """The map, the strongest and weakest heads, and the files to open next."""
    mean = run["head_resid_contrib_norm_mean"].values
    order = np.argsort(mean, axis=None)[::-1]
    names = [".".join(map(str, np.unravel_index(i, mean.shape))) for i in order]
    lines = [
        "",
        "Mean residual contribution ||z_h W_O|| of every head (rows: layers, columns: heads)",
        unicode_heatmap(mean),
        f"  strongest (layer.head): {', '.join(names[:4])}",
        f"  weakest:                {', '.join(names[-4:])}",
        f"  accuracy on {run.attrs['num_processed']} held-out questions: "
        f"{run.attrs['accuracy']:.3f} (chance 0.20 to 0.25)",
        "",
        "Look at",
        f"  {path / 'report.html'}",
        f"  {path / 'head_resid_contrib_norm_heatmap.html'}",
        f"  {path / 'head_output_norm_heatmap.html'}",
        "Load it:  from tl_headnorm import load_run",
        f"          run = load_run({str(path)!r})",
    ]
    return "\n".join(lines)


def unicode_heatmap(values: np.ndarray, width: int = 3) -> str:
    """A [layer, head] array as shaded cells; "·" where there is no data."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    span = (high - low) or 1.0
    rows = ["        " + "".join(f"{head:^{width}d}" for head in range(values.shape[1]))]
    for layer, row in enumerate(values):
        cells = [
            "·" if not np.isfinite(v) else SHADES[round((v - low) / span * (len(SHADES) - 1))]
            for v in row
        ]
        rows.append(f"  {layer:>4}  " + "".join(cell * width for cell in cells))
    rows.append(f"        {SHADES[0]!r} = {low:.3g}   {SHADES[-1]!r} = {high:.3g}")
    return "\n".join(rows)
