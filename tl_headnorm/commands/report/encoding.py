"""Per-sample values as text in a page: 16 bits a value, decoded one head at a time."""

import base64
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

STEPS = 65534  # 65535 is "no value"
# Per-sample values of all measures, before base64 makes them a third larger: a page stays
# below 25 MB with the texts.
MOST_BYTES = 12_000_000


@dataclass(frozen=True)
class Encoded:
    """Values of every head over samples, as base64 of little-endian uint16, head after head.

    A value is `low + code / 65534 * (high - low)` with its head's own low and high, so it is
    off by at most (high - low) / 131068; code 65535 is NaN. Each head has `stride` characters:
    samples are padded to a multiple of three, so that a head can be decoded by itself.
    """

    text: str
    stride: int
    low: Float[np.ndarray, " row"]
    high: Float[np.ndarray, " row"]


def encode(values: Shaped[np.ndarray, "sample layer head"]) -> Encoded:
    """Encode values; rows are heads in the order of (layer, head)."""
    n_samples, n_layers, n_heads = values.shape
    padded = -(-n_samples // 3) * 3
    codes = np.full((n_layers, n_heads, padded), STEPS + 1, "<u2")
    low, high = (np.full((n_layers, n_heads), np.nan) for _ in range(2))
    for layer in range(n_layers):  # one at a time: the values may be a file larger than memory
        rows = np.asarray(values[:, layer], np.float64).T
        real = np.isfinite(rows)
        some = real.any(axis=1)
        low[layer, some] = np.where(real, rows, np.inf).min(axis=1)[some]
        high[layer, some] = np.where(real, rows, -np.inf).max(axis=1)[some]
        span = (high - low)[layer, :, None]
        share = np.zeros(rows.shape)
        np.divide(rows - low[layer, :, None], span, out=share, where=real & (span > 0))
        codes[layer, :, :n_samples] = np.where(real, np.rint(share * STEPS), STEPS + 1)
    text = base64.b64encode(codes.tobytes()).decode("ascii")
    return Encoded(text, padded * 8 // 3, low.ravel(), high.ravel())


def samples_that_fit(
    n_samples: int, n_heads: int, n_measures: int, seed: int, most_bytes: int = MOST_BYTES
) -> Int[np.ndarray, " shown"]:
    """Indices of the samples on the page: all that fit, else a random subset by `seed`, sorted."""
    fitting = most_bytes // max(1, 2 * n_heads * n_measures)
    if n_samples <= fitting:
        return np.arange(n_samples)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(n_samples, size=max(1, fitting), replace=False))
