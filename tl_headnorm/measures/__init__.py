"""Measures: one number per head and sample, from one layer's activations."""

from tl_headnorm.engine.positions import last_real_position, take_position
from tl_headnorm.measures.activations import (
    LayerActivations,
    Weights,
    contribution_factor,
    output_norm,
    ratio,
    resid_contrib_norm,
    sum_over_tokens,
)
from tl_headnorm.measures.registry import choose_measures, load_measures
from tl_headnorm.measures.table import (
    FOLLOW_TOKEN_AGG,
    MEASURES,
    NORMS,
    READS,
    Measure,
    layer_normalised,
    uniform_first_attention,
)

__all__ = [
    "FOLLOW_TOKEN_AGG",
    "MEASURES",
    "NORMS",
    "READS",
    "LayerActivations",
    "Measure",
    "Weights",
    "choose_measures",
    "contribution_factor",
    "last_real_position",
    "layer_normalised",
    "load_measures",
    "output_norm",
    "ratio",
    "resid_contrib_norm",
    "sum_over_tokens",
    "take_position",
    "uniform_first_attention",
]
