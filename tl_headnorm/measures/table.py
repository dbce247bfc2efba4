"""MEASURES: one number per head and sample, and its aggregation over tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from tl_headnorm.measures.activations import HeadValues, LayerActivations, ratio

# What a measure may read of a layer; `answer` is the direction of the answer's logit.
READS = ("z", "pattern", "v", "resid_pre", "answer")
# Which tokens make the number: agg follows the settings token_agg and exclude_first_token.
TOKENS = ("agg", "last", "all", "first", "after_first", "last_to_all")


def attention_first(activations: LayerActivations) -> HeadValues:
    """pattern[q, 0], the weight of the prompt's first token; a sink's is about 1.

    Uniform attention has 1/(q + 1) (`uniform_first_attention`). It does not say that anything is
    moved: see the first token's value.
    """
    first = activations.real_keys.int().argmax(1)
    rows = torch.arange(len(first), device=first.device)
    return (
        activations.pattern[rows, :, :, first].transpose(1, 2).to(activations.weights.factor.dtype)
    )


def attention_entropy(activations: LayerActivations) -> HeadValues:
    """-sum_j a_qj ln a_qj in nats, 0 ln 0 = 0: from 0 (one key) to ln(q + 1) (uniform)."""
    wide = activations.pattern.to(activations.weights.factor.dtype)
    return torch.special.entr(wide).sum(-1).transpose(1, 2)


def value_norm(activations: LayerActivations) -> HeadValues:
    """||v||_2 of the head's value, which a group of heads shares."""
    sizes = torch.linalg.vector_norm(activations.v, dim=-1, dtype=activations.weights.factor.dtype)
    return sizes.repeat_interleave(activations.z.shape[2] // sizes.shape[2], dim=2)


def value_contribution(activations: LayerActivations) -> HeadValues:
    """sum_j a_qj ||v_j W_O^h||, at least ||z_q W_O^h||: what is moved before it may cancel.

    Source: Kobayashi et al., "Attention is Not Only a Weight", 2020. Their vectors a_qj v_j W_O
    are never formed.
    """
    wide = activations.pattern.to(activations.weights.factor.dtype)
    return einsum(wide, activations.value_contributions, "b head q key, b key head -> b q head")


def contribution_to_resid(activations: LayerActivations) -> HeadValues:
    """||z_h W_O^h|| / ||resid_pre||: the contribution relative to the residual it is added to."""
    size = torch.linalg.vector_norm(
        activations.resid_pre, dim=-1, dtype=activations.weights.factor.dtype
    )
    return ratio(activations.contributions, size.unsqueeze(-1).expand_as(activations.contributions))


def direct_logit(activations: LayerActivations) -> HeadValues:
    """z_h W_O^h times the answer's direction: the head's own share of the answer's logit.

    To be divided by the final norm's scale. Effects through later layers are not in it.
    """
    wide = activations.weights.factor.dtype
    through = (activations.answer.to(wide) @ activations.weights.flat.to(wide)).unflatten(
        1, activations.z.shape[2:]
    )
    return (activations.z.to(wide) * through.unsqueeze(1)).sum(-1)


def layer_normalised(
    values: Float[np.ndarray, "*any layer head"],
) -> Float[np.ndarray, "*any layer head"]:
    """Each value over its layer's mean size on that sample; 0 where all are 0.

    Layers differ in scale by orders of magnitude: undivided, a small score says little more than
    which layer a head is in. For measures with both signs the size is |value|.
    """
    mean = np.abs(values).mean(axis=-1, keepdims=True)
    return np.divide(values, mean, out=np.zeros_like(values), where=mean != 0)


def uniform_first_attention(n_tokens: int) -> float:
    """attention_first of uniform attention: the mean of 1/(q + 1) over q >= 1."""
    shares = [1 / (q + 1) for q in range(1, n_tokens)]
    return sum(shares) / len(shares) if shares else float("nan")


@dataclass(frozen=True)
class Measure:
    """One number per head and sample.

    `compute` gives it for every query of a layer, [batch, pos, head]; `tokens` says which queries
    make the sample's number (TOKENS; all but `last` and `first` are means, `last_to_all` the last
    one over the mean); `reads` what is needed of the layer (READS). `final_scale`: divided by the
    final norm's scale at the last token. `least_tokens`: NaN for shorter prompts.
    """

    name: str
    formula: str
    unit: str
    compute: Callable[[LayerActivations], Tensor]
    tokens: str = "agg"
    reads: tuple[str, ...] = ("z",)
    final_scale: bool = False
    least_tokens: int = 1
    source: str | None = None

    def counted(
        self, activations: LayerActivations, exclude_first: bool
    ) -> Bool[Tensor, "batch pos"]:
        """The queries that enter the mean."""
        if self.tokens == "first":
            return activations.real & (activations.place == 0)
        if self.tokens == "after_first" or (self.tokens == "agg" and exclude_first):
            return activations.real & (activations.place > 0)
        return activations.real

    def at_last(self, token_agg: str) -> bool:
        """Whether the number is the last token's alone."""
        return self.tokens == "last" or (self.tokens == "agg" and token_agg == "last")


_L2, _RESID, _SHARE = "activation units (L2)", "residual units (L2)", "share"
_PATTERN = ("z", "pattern")

MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        Measure("head_output_norm", "‖z_h‖", _L2, attrgetter("output_norms")),
        Measure("head_resid_contrib_norm", "‖z_h W_O‖", _RESID, attrgetter("contributions")),
        Measure("output_norm_last", "‖z_h‖ at last", _L2, attrgetter("output_norms"), "last"),
        Measure("output_norm_all", "mean ‖z_h‖", _L2, attrgetter("output_norms"), "all"),
        Measure(
            "output_norm_last_to_all", "‖z_h‖ at last / mean", _SHARE,
            attrgetter("output_norms"), "last_to_all",
        ),
        Measure(
            "contrib_norm_last", "‖z_h W_O‖ at last", _RESID, attrgetter("contributions"), "last"
        ),
        Measure("contrib_norm_all", "mean ‖z_h W_O‖", _RESID, attrgetter("contributions"), "all"),
        Measure(
            "contrib_norm_last_to_all", "‖z_h W_O‖ at last / mean", _SHARE,
            attrgetter("contributions"), "last_to_all",
        ),
        Measure(
            "attention_first", "mean a_q0", _SHARE, attention_first, "after_first", _PATTERN,
            least_tokens=2,
        ),
        Measure(
            "attention_entropy", "mean entropy of a_q", "nats", attention_entropy, "all", _PATTERN
        ),
        Measure("value_norm_first", "‖v_0‖", _L2, value_norm, "first", ("z", "v")),
        Measure("value_norm_all", "mean ‖v_j‖", _L2, value_norm, "all", ("z", "v")),
        Measure(
            "value_contribution", "mean Σ_j a_qj ‖v_j W_O‖", _RESID, value_contribution, "all",
            ("z", "pattern", "v"),
        ),
        Measure(
            "contrib_to_resid_last", "‖z_h W_O‖ / ‖x‖ at last", _SHARE, contribution_to_resid,
            "last", ("z", "resid_pre"),
        ),
        Measure(
            "contrib_to_resid_all", "mean ‖z_h W_O‖ / ‖x‖", _SHARE, contribution_to_resid,
            "all", ("z", "resid_pre"),
        ),
        Measure("cosine_last", "cos(z_h W_O, attn_out) at last", "cosine", attrgetter("cosines"),
                "last"),
        Measure("cosine_all", "mean cos(z_h W_O, attn_out)", "cosine", attrgetter("cosines"),
                "all"),
        Measure(
            "direct_logit", "z_h W_O · (answer − other letters)", "logits", direct_logit, "last",
            ("z", "answer"), final_scale=True,
        ),
    )
}  # fmt: skip
FOLLOW_TOKEN_AGG = tuple(name for name, measure in MEASURES.items() if measure.tokens == "agg")
# The default of `measures`.
NORMS = (MEASURES["head_output_norm"], MEASURES["head_resid_contrib_norm"])
