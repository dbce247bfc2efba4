"""The table of families and engines: worst relative difference of the norms to Hugging Face.

Every family is a small random model with odd sizes, in float32. Measured are both norms of every
head, at the last token and over all, padded left and right, with and without a shared beginning.
"""

import itertools
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.families import FAMILIES, has_hooked
from tl_headnorm.model.loading import load_model
from tl_headnorm.model.random_models import FAMILY_MODELS, family_model
from tl_headnorm.oracle import hugging_face

ENGINES = ("hooked", "bridge")


def prompts(n: int = 9, shared: int = 7, seed: int = 0) -> list[Encoded]:
    """Random token ids of the small models' vocabulary, of different lengths."""
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 97, shared).tolist()
    return [
        Encoded(i, (*head, *rng.integers(3, 97, rng.integers(2, 24)).tolist())) for i in range(n)
    ]


def worst_difference(family: str, engine: str) -> float:
    """The worst relative difference of one family on one engine, over all ways to measure."""
    model = load_model(hf_model=family_model(family), engine=engine)
    found = []
    for agg, side, shared in itertools.product(("last", "all"), ("left", "right"), (0, 7)):
        samples = prompts(shared=shared)
        ours = measure_samples(model, samples, token_agg=agg, padding_side=side).values
        theirs = hugging_face.measure_samples(model.hf, samples, token_agg=agg, padding_side=side)
        found += [
            hugging_face.compare(np.asarray(ours[name], np.float64), theirs[name])["worst_relative"]
            for name in hugging_face.NAMES
        ]
    return max(found)


def measure(families: Sequence[str] = tuple(FAMILY_MODELS)) -> dict[str, dict[str, float]]:
    """family -> engine -> worst relative difference, where the engine computes the family."""
    found: dict[str, dict[str, float]] = {}
    for family in families:
        hooked = has_hooked() and FAMILY_MODELS[family].architecture in FAMILIES
        engines = ENGINES if hooked else ("bridge",)
        found[family] = {engine: worst_difference(family, engine) for engine in engines}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The differences as a markdown table; a dash where the engine does not compute the family."""
    lines = [
        f"transformer-lens {version('transformer-lens')}, transformers {version('transformers')}, "
        "fp32, worst relative difference to Hugging Face:",
        "",
        "| family | architecture | hooked | bridge |",
        "|---|---|---|---|",
    ]
    for family, by_engine in found.items():
        cells = [f"{by_engine[e]:.1e}" if e in by_engine else "–" for e in ENGINES]
        lines.append(f"| {family} | {FAMILY_MODELS[family].architecture} | {' | '.join(cells)} |")
    return "\n".join(lines)
