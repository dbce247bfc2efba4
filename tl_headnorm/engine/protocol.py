"""The engine protocol: forward passes with hooks, late starts, prefixes and tails; weights; logits.

Two implementations: `hooked.HookedEngine` (HookedTransformer, transformer-lens up to 3.9) and
`bridge.BridgeEngine` (TransformerBridge, 3.9 and 4.x). What planning needs to know is an
attribute (`shares_prefix`, `starts_late`, `splits_blocks`), not which engine it is.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.errors import InputError

ZByLayer = dict[int, Float[Tensor, "batch pos head d_head"]]
# A hook point's name and its function; a returned tensor replaces the activation.
Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]
# Called with a layer and its activations by name; a returned tensor replaces z.
OnLayer = Callable[[int, dict[str, Tensor]], Tensor | None]
# (new tokens [batch, new], mask [batch, pos] of all so far) -> logits after the last one.
CachedPass = Callable[[Tensor, Tensor], Float[Tensor, "batch vocab"]]


@dataclass(frozen=True)
class Start:
    """Where a pass begins: at the tokens, or at `layer` with the residual before it."""

    ids: Int[Tensor, "row pos"] | None = None
    layer: int = 0
    resid: Float[Tensor, "row pos d_model"] | None = None


@dataclass(frozen=True)
class Tail:
    """The part of the last block that is wanted: z everywhere or at `last`; the residual or not."""

    last: Int[Tensor, " batch"]
    z_everywhere: bool
    resid: bool


@dataclass(frozen=True)
class Prefix:
    """Tokens that many prompts begin with, run once.

    `cache` holds their keys and values in the engine's own form; None where the engine runs the
    ids again with every batch. `z` is empty where a caller took the layers as they came.
    """

    ids: tuple[int, ...]
    cache: Any
    z: ZByLayer = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pass:
    """One forward pass: z by layer (missing where the hook did not fire), residual, extras."""

    z: ZByLayer
    resid: Float[Tensor, "batch resid_pos d_model"]
    extra: dict[str, Tensor]


@dataclass(frozen=True)
class FinalNorm:
    """(x - mean(x) if `centred`) / sqrt(mean of its squares + eps) * weight, and a bias or none."""

    weight: Float[Tensor, " d_model"]
    eps: float
    centred: bool


@runtime_checkable
class Engine(Protocol):
    """A decoder-only model that runs with TransformerLens' hook points.

    Shared bodies are here; an implementation says how a pass begins, ends and caches.
    """

    tl: Any
    # A prefix that is run once saves its computation in later batches.
    shares_prefix: bool
    # A pass from a later layer does not compute the layers below it.
    starts_late: bool

    # Sizes

    @property
    def cfg(self) -> Any:
        return self.tl.cfg

    @property
    def n_layers(self) -> int:
        return int(self.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        return int(self.cfg.n_heads)

    @property
    def n_ctx(self) -> int:
        return int(self.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        return torch.device(self.cfg.device)

    @property
    def splits_blocks(self) -> bool:
        """Whether a block is resid + attn_out, then + mlp(ln2(resid)), and can start between."""
        return self.starts_late and not (
            self.cfg.parallel_attn_mlp
            or getattr(self.cfg, "use_normalization_before_and_after", False)
        )

    # Passes

    @abstractmethod
    def run(
        self,
        start: Start,
        mask: Int[Tensor, "batch pos"],
        hooks: Sequence[Hook] = (),
        *,
        tail: Tail | None = None,
        prefix: Prefix | None = None,
        stop: int | None = None,
    ) -> Float[Tensor, "batch resid_pos d_model"]:
        """The residual after the last block, or before layer `stop`; nothing is unembedded.

        At all positions, or with `tail` at its last ones. With a `prefix`, ids and mask are what
        follows it. Differentiable where gradients are enabled.
        """
        ...

    @abstractmethod
    def run_z(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        *,
        prefix: Prefix | None = None,
        tail: Tail | None = None,
        extra: Sequence[str] = (),
    ) -> Pass:
        """z of every layer, the residual stream after the last block, any `extra` activations.

        One forward pass by `run_with_cache`, filtered to `hook_z`; neither the final norm nor
        the unembedding is computed. With a `prefix`, ids and mask are what follows it. With a
        `tail`, z is [batch, 1, head, d_head] unless it is wanted everywhere, the residual
        [batch, 1, d_model].
        """
        ...

    def run_layers(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        on_layer: OnLayer,
        *,
        reads: Sequence[str] = ("z",),
        prefix: Prefix | None = None,
        tail: Tail | None = None,
        edits: bool = False,
    ) -> Float[Tensor, "batch resid_pos d_model"]:
        """Call `on_layer(layer, {name: activation})` for every layer; the residual at the end.

        `reads` are names of functions in hook_names.py, z among them. z alone comes from
        `run_z`; where more is read, or z is edited, `on_layer` is called as the pass goes and
        one layer's activations exist at a time. Positions are those of the pass (a prefix is
        not in them, but for a pattern's keys); with a `tail` the last block may give the last
        one alone. With `edits`, a returned tensor replaces z.
        """
        if set(reads) == {"z"} and not edits:
            found = self.run_z(ids, mask, prefix=prefix, tail=tail)
            while found.z:
                on_layer(layer := next(iter(found.z)), {"z": found.z.pop(layer)})
            return found.resid
        readers = layer_readers(self.n_layers, reads, on_layer)
        return self.run(Start(ids), mask, readers, prefix=prefix, tail=tail)

    @abstractmethod
    def run_prefix(
        self,
        ids: Sequence[int],
        *,
        reads: Sequence[str] = ("z",),
        on_layer: OnLayer | None = None,
    ) -> Prefix:
        """Run tokens that many prompts begin with, for use by later batches.

        With `on_layer` its layers are reported as in `run_layers` and the result holds no z.
        """
        ...

    @abstractmethod
    def prefix_values(self, prefix: Prefix, layer: int) -> Float[Tensor, "1 pos kv_head d_head"]:
        """Values of the prefix's tokens."""
        ...

    @abstractmethod
    def cached_pass(self, n_rows: int) -> CachedPass:
        """A pass with a growing key/value cache, for generation: (new ids, mask) -> logits.

        Logits are those after the last token, [batch, vocab], float32 or wider.
        """
        ...

    @abstractmethod
    def head_sum_name(self, layer: int) -> str:
        """Hook point of sum_h z_h W_O^h + b_O, before a norm that may follow it."""
        ...

    def check_length(self, length: int) -> None:
        """Refuse prompts that the model's positions or its sliding window do not cover."""
        if length > self.n_ctx:
            raise InputError(
                f"prompt: expected at most {self.n_ctx} tokens, the context this engine computes "
                f"faithfully, found {length}; shorten it"
            )

    def hooks(self, hooks: Sequence[Hook]) -> Any:
        """Context manager: the hooks are in place in every pass inside it."""
        return self.tl.hooks(fwd_hooks=list(hooks))

    @contextmanager
    def zero_heads(self, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
        """While inside, z of the given (layer, head) pairs is zero at every position."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in heads:
            by_layer.setdefault(layer, []).append(head)

        def zero(off: list[int]) -> Callable[[Tensor, Any], Tensor]:
            def edit(z: Tensor, hook: Any) -> Tensor:
                edited = z.clone()
                by_head(edited, self.n_heads)[:, :, off] = 0
                return edited

            return edit

        with self.hooks([(hook_names.z(layer), zero(off)) for layer, off in by_layer.items()]):
            yield

    # Weights, and parts of a block

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of a layer's heads, as the model holds them (on its first device)."""
        return self.tl.blocks[layer].attn.W_O.detach().to(self.cfg.device)

    def b_O(self, layer: int) -> Float[Tensor, " d_model"]:
        """The bias a layer's attention adds beside its heads."""
        bias = self.tl.blocks[layer].attn.b_O
        if bias is None:  # the bridge's way of saying that there is none
            return self.W_O(layer).new_zeros(self.cfg.d_model)
        return bias.detach().to(self.cfg.device)

    def add_heads(
        self,
        layer: int,
        resid_pre: Float[Tensor, "#batch pos d_model"],
        z: Float[Tensor, "*stack pos head d_head"],
    ) -> Float[Tensor, "*stack pos d_model"]:
        """The residual behind a layer's attention: resid_pre + sum_h z_h W_O^h + b_O."""
        weight = self.W_O(layer)
        flat = weight.permute(2, 0, 1).reshape(weight.shape[2], -1)
        return resid_pre + F.linear(z.flatten(-2), flat, self.b_O(layer))

    def mlp(
        self, layer: int, resid_mid: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos d_model"]:
        """The output of a layer's MLP, from the residual behind its attention."""
        block = self.tl.blocks[layer]
        out: Tensor = block.mlp(block.ln2(resid_mid))
        return out

    # Embedding and unembedding

    @property
    @abstractmethod
    def final_norm(self) -> FinalNorm:
        """The norm before the unembedding."""
        ...

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Token embeddings."""
        tl = self.tl
        table: Tensor = tl.embed.W_E if hasattr(tl.embed, "W_E") else tl.W_E
        return table.detach()

    def logits(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        """Final norm and unembedding of residual vectors."""
        return self._finished(self.tl.unembed(self.tl.ln_final(resid)))

    @property
    def logit_factor(self) -> float:
        """Factor of the logits behind the unembedding (Granite, Cohere)."""
        return 1.0

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits as the model gives them: scaled (Granite, Cohere) and bent (Gemma 2)."""
        logits = logits if self.logit_factor == 1 else logits * self.logit_factor
        cap = getattr(self.cfg, "output_logits_soft_cap", None)
        return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits

    def token_logits(
        self,
        resid: Float[Tensor, "batch d_model"],
        token_ids: Int[Tensor, "batch option"],
    ) -> Float[Tensor, "batch option"]:
        """Logits of a few tokens per prompt at one residual vector; only they are unembedded.

        float32 or wider, so that ties of a narrow type do not choose the answer.
        """
        unembed = self.tl.unembed
        final = self.tl.ln_final(resid.unsqueeze(1)).squeeze(1)
        columns = unembed.W_U.T[token_ids.to(unembed.W_U.device)].to(final.device)
        wide = torch.promote_types(final.dtype, torch.float32)
        logits = torch.einsum("bm,bom->bo", final.to(wide), columns.to(wide))
        if unembed.b_U is not None:
            logits = logits + unembed.b_U.to(final.device)[token_ids].to(wide)
        return self._finished(logits)

    def answer_directions(
        self,
        token_ids: Int[Tensor, "batch option"],
        n_options: Int[Tensor, " batch"],
        answers: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch d_model"]:
        """u with x u / scale = logit of the answer's token minus the mean of the other options'.

        x is the residual at the last token (centred within u where the final norm centres),
        scale `final_scale`; what biases add is left out. float32 or wider.
        """
        W_U, norm = self.tl.unembed.W_U, self.final_norm
        token_ids, n_options, answers = (x.to(W_U.device) for x in (token_ids, n_options, answers))
        wide = torch.promote_types(W_U.dtype, torch.float32)
        columns = W_U.T[token_ids].to(wide)
        option = torch.arange(token_ids.shape[1], device=token_ids.device)
        right = option == answers[:, None]
        others = (option < n_options[:, None]) & ~right
        weight = right.to(wide) - others.to(wide) / others.sum(1, keepdim=True).clamp_min(1)
        direction = torch.einsum("bo,bom->bm", weight, columns) * norm.weight.to(columns)
        direction = direction * self.logit_factor
        if norm.centred:  # <x - mean(x), u> = <x, u - mean(u)>
            direction = direction - direction.mean(-1, keepdim=True)
        return direction.to(self.device)

    def final_scale(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
        """Divisor of the final norm at a residual vector."""
        norm, wide = self.final_norm, resid.to(torch.promote_types(resid.dtype, torch.float32))
        if norm.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.pow(2).mean(-1) + norm.eps).sqrt()


def layer_readers(n_layers: int, reads: Sequence[str], on_layer: OnLayer) -> list[Hook]:
    """Hooks that gather a layer's activations and report them when the last of them is there.

    That is z, but in families whose attention is Hugging Face's own: there the pattern comes
    behind z, which can then no longer be replaced. Raises InputError where that is tried.
    """
    held: dict[int, dict[str, Tensor]] = {}

    def reader(layer: int, name: str) -> Callable[[Tensor, Any], Tensor | None]:
        def read(value: Tensor, hook: Any) -> Tensor | None:
            found = held.setdefault(layer, {})
            found[name] = value
            if len(found) < len(reads):
                return None
            new = on_layer(layer, held.pop(layer))
            if new is not None and name != "z":
                raise InputError(
                    f"engine: expected z to be the last of what is read of a layer, found {name} "
                    "behind it in this family; read z alone to replace it"
                )
            return new

        return read

    return [
        (getattr(hook_names, name)(layer), reader(layer, name))
        for layer in range(n_layers)
        for name in reads
    ]


def by_head(z: Tensor, n_heads: int) -> Float[Tensor, "batch pos head d_head"]:
    """z with a head axis; some bridges give the heads flattened."""
    return z if z.dim() == 4 else rearrange(z, "b p (h d) -> b p h d", h=n_heads)


def wide(logits: Tensor) -> Tensor:
    """float32 or wider, so that a narrow type's ties do not choose the token."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
