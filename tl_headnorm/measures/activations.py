"""One layer's activations, and the norms and reductions that measures share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_headnorm.errors import InputError

HeadValues = Float[Tensor, "batch pos head"]


def output_norm(
    z: Float[Tensor, "batch pos head d_head"], factor: Float[Tensor, "head k d_head"]
) -> HeadValues:
    """||z_h||_2, in the units of the activations, before W_O."""
    return torch.linalg.vector_norm(z, dim=-1, dtype=factor.dtype)


def resid_contrib_norm(
    z: Float[Tensor, "batch pos head d_head"], factor: Float[Tensor, "head k d_head"]
) -> HeadValues:
    """||z_h W_O^h||_2 = ||R_h z_h||_2, the size of what head h adds to the residual stream.

    R_h is `contribution_factor(W_O)`. No [batch, pos, head, d_model] tensor is made. It says
    nothing of the direction: two heads of equal norm may cancel.
    """
    projected = einsum(
        z.to(factor.dtype), factor, "batch pos head d_head, head k d_head -> batch pos head k"
    )
    return torch.linalg.vector_norm(projected, dim=-1)


def contribution_factor(
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "head k d_head"]:
    """R_h with ||R_h z|| = ||z W_O^h|| for every z: the R of a QR of W_O^h transposed.

    W_O^h^T = Q R with Q's columns orthonormal, so ||z W_O^h|| = ||Q R z|| = ||R z||.
    k = min(d_head, d_model). Decomposed in float64; float32 for weights of float32 and narrower.
    """
    transposed = rearrange(W_O, "head d_head d_model -> head d_model d_head")
    R = torch.linalg.qr(transposed.double(), mode="r").R
    return R if W_O.dtype == torch.float64 else R.float()


def sum_over_tokens(
    values: HeadValues, counted: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch 1"]]:
    """(sum, count) over the counted tokens of every row."""
    # where, not a product: a padded position may hold anything at all.
    values = torch.where(counted.unsqueeze(-1), values, values.new_zeros(()))
    return values.sum(1), counted.sum(1, keepdim=True).to(values.dtype)


def ratio(above: Float[Tensor, "*any"], below: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """above / below; 0 where `below` is 0."""
    return torch.where(below == 0, 0, above / torch.where(below == 0, 1, below))


@dataclass(frozen=True)
class Weights:
    """A layer's W_O and b_O, and the factor R with ||R_h z|| = ||z W_O^h||."""

    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    factor: Float[Tensor, "head k d_head"]

    @cached_property
    def flat(self) -> Float[Tensor, "d_model channel"]:
        """W_O as one matrix, heads concatenated: a view of Hugging Face's own layout."""
        return rearrange(self.W_O, "head d_head d_model -> d_model (head d_head)")


@dataclass(frozen=True)
class LayerActivations:
    """One layer's activations in one forward pass: its queries are the tokens of the pass.

    Its keys are the same tokens, those of a prefix run before in front of them. Where only the
    last token is wanted, there is one query. `place` is a query's place in its prompt, from 0.
    """

    z: Float[Tensor, "batch pos head d_head"]
    real: Bool[Tensor, "batch pos"]
    place: Int[Tensor, "batch pos"]
    real_keys: Bool[Tensor, "batch key"]
    weights: Weights
    read: Mapping[str, Tensor] = field(default_factory=dict)

    def _read(self, name: str) -> Tensor:
        if name not in self.read:
            raise InputError(
                f"measure: expected {name!r} among what it reads, found it missing; add it to the "
                "measure's reads"
            )
        return self.read[name]

    @property
    def pattern(self) -> Float[Tensor, "batch head pos key"]:
        """Attention weights; 0 at keys that are padding."""
        return self._read("pattern")

    @property
    def v(self) -> Float[Tensor, "batch pos kv_head d_head"]:
        """Values of the pass's tokens, one per group of heads."""
        return self._read("v")

    @property
    def resid_pre(self) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before the layer."""
        return self._read("resid_pre")

    @property
    def answer(self) -> Float[Tensor, "batch d_model"]:
        """Direction d of the answer's logit: resid / final_scale · d is the logit of the answer's
        letter minus the mean of the other letters' (biases left out)."""
        return self._read("answer")

    @cached_property
    def output_norms(self) -> HeadValues:
        """||z_h||."""
        return output_norm(self.z, self.weights.factor)

    @cached_property
    def contributions(self) -> HeadValues:
        """||z_h W_O^h||."""
        return resid_contrib_norm(self.z, self.weights.factor)

    @cached_property
    def value_contributions(self) -> Float[Tensor, "batch key head"]:
        """||v_j W_O^h|| = ||R_h v_j|| of every key j, a head's value that of its group."""
        sizes = self._contributed(self.v)
        if "past_v" in self.read:
            past = self._contributed(self.read["past_v"]).expand(len(sizes), -1, -1)
            sizes = torch.cat([past, sizes], dim=1)
        return torch.where(self.real_keys.unsqueeze(-1), sizes, sizes.new_zeros(()))

    def _contributed(self, v: Tensor) -> Float[Tensor, "batch some head"]:
        factor = self.weights.factor
        grouped = rearrange(factor, "(kv group) k d_head -> kv group k d_head", kv=v.shape[2])
        projected = einsum(
            v.to(factor.dtype), grouped, "b pos kv d_head, kv group k d_head -> b pos kv group k"
        )
        return torch.linalg.vector_norm(projected, dim=-1).flatten(2)

    @cached_property
    def cosines(self) -> HeadValues:
        """Cosine of z_h W_O^h with the layer's attention output a = sum_h z_h W_O^h + b_O.

        <z_h W_O^h, a> = <z_h, W_O^h a>: two products with W_O as a whole.
        """
        flat, wide = self.weights.flat, self.weights.factor.dtype
        out = torch.nn.functional.linear(self.z.flatten(2).to(flat.dtype), flat, self.weights.b_O)
        back = (out @ flat).unflatten(2, self.z.shape[2:])
        dot = (self.z.to(wide) * back.to(wide)).sum(-1)
        size = torch.linalg.vector_norm(out, dim=-1, dtype=wide)
        return ratio(dot, self.contributions * size.unsqueeze(-1))
