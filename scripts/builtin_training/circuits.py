"""The model's shape and its first weights, some of which are set by hand.

Questions like these need several attention circuits at once, and gradient descent finds them
one at a time and slowly.  The first weights therefore hold plain building blocks, and training
does the rest:

* layer 0: four heads that look exactly 1, 2, 3 and 4 tokens back and write what they see;
* layer 1: heads that match the token before the query (or the query's own token) with a key's
  own token or with what stood before it, and read what stood before it or the key itself;
* layer 2: heads that copy a token as it is, from anywhere;
* layer 3: heads that match a token with itself and read what stood two tokens before it, which
  for an option is its letter.

Matching uses the slowly turning rotary pairs alone, looking back the quickly turning ones.
Nothing of the world or of the template's wording is set: which token to look from, whom to
copy and how to compare is learned, and every weight goes on learning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

D_MODEL, D_HEAD, N_HEADS, N_KV, N_LAYERS, D_MLP = 128, 32, 8, 2, 4, 320
ROPE_THETA = 500_000.0
_HALF = D_HEAD // 2
_FAST = 3  # rotary pairs 0..2 tell neighbouring positions apart
_SLOW = 5  # rotary pairs 5..15 hardly turn within one prompt
_GROUP = N_HEADS // N_KV
_EMBED_STD, _CONSTANT = 0.05, 0.4


def make_config(vocab_size: int, bos: int, eos: int, pad: int) -> LlamaConfig:
    """Describe the model."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV,
        head_dim=D_HEAD,
        max_position_embeddings=1024,
        # Both names: readers before and after the fifth major release know one each.
        rope_theta=ROPE_THETA,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _orthonormal(rows: int, generator: torch.Generator) -> Tensor:
    """Draw orthonormal rows that leave out the constant direction, dimension 0."""
    square = torch.randn(D_MODEL - 1, D_MODEL - 1, generator=generator)
    basis = torch.linalg.qr(square).Q[:rows]
    return torch.cat([torch.zeros(rows, 1), basis], dim=1)


class _Setter:
    """Writes hand-made heads into a freshly drawn model."""

    def __init__(self, model: LlamaForCausalLM, generator: torch.Generator) -> None:
        self.model = model
        self.words = _orthonormal(D_HEAD, generator)
        # seen[k] is where layer 0 writes the token k places back; seen[0] is the token itself.
        self.seen = [self.words] + [_orthonormal(D_HEAD, generator) for _ in range(_GROUP)]

    def _rows(self, kind: str, layer: int, head: int) -> Tensor:
        attention = self.model.model.layers[layer].self_attn
        return getattr(attention, f"{kind}_proj").weight[head * D_HEAD : (head + 1) * D_HEAD]

    def write(self, layer: int, head: int, target: Tensor, gain: float) -> None:
        """Let a head write its 32 values along the rows of ``target``."""
        weight = self.model.model.layers[layer].self_attn.o_proj.weight
        weight[:, head * D_HEAD : (head + 1) * D_HEAD] += gain * target.T

    def read(self, layer: int, group: int, source: Tensor, gain: float = 0.25) -> None:
        """Let a key-value group carry what stands along the rows of ``source``."""
        self._rows("v", layer, group).add_(gain * source)

    def look_back(self, layer: int, head: int, distance: int, gain: float = 1.3) -> None:
        """Make a query for a fixed distance out of the constant direction alone."""
        pairs = torch.arange(_FAST)
        angle = -distance * ROPE_THETA ** (-pairs / _HALF)
        rows = self._rows("q", layer, head)
        rows.zero_()
        rows[pairs, 0], rows[pairs + _HALF, 0] = gain * angle.cos(), gain * angle.sin()

    def stand_here(self, layer: int, group: int, gain: float = 1.3) -> None:
        """Make the keys that ``look_back`` queries look for."""
        rows = self._rows("k", layer, group)
        rows.zero_()
        rows[:_FAST, 0] = gain

    def match(self, kind: str, layer: int, head: int, source: Tensor, gain: float) -> None:
        """Put the word found along the rows of ``source`` into the slow rotary pairs."""
        slow = torch.cat([torch.arange(_SLOW, _HALF), torch.arange(_HALF + _SLOW, D_HEAD)])
        self._rows(kind, layer, head)[slow] += gain * source[: len(slow)]


@torch.no_grad()
def make_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Draw a model and set its building blocks by hand."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    embed = model.model.embed_tokens.weight
    embed.normal_(0.0, _EMBED_STD, generator=generator)
    embed[:, 0] = _CONSTANT
    heads = _Setter(model, generator)
    heads.stand_here(0, 0)
    heads.read(0, 0, heads.words)
    for head in range(_GROUP):
        heads.look_back(0, head, head + 1)
        heads.write(0, head, heads.seen[head + 1], 0.25)
    last = config.num_hidden_layers - 1
    for layer in range(1, last - 1):
        _match_facts(heads, layer)
    for head in range(N_HEADS):
        heads.write(last - 1, head, heads.words, 0.1)
        heads.write(last, head, heads.words, 0.3)
        heads.match("q", last, head, heads.words, 2.0)
    for group in range(N_KV):
        heads.read(last - 1, group, heads.words)
        heads.match("k", last, group, heads.words, 2.0)
        heads.read(last, group, heads.seen[2])
    return model


def _match_facts(heads: _Setter, layer: int) -> None:
    """Set layer 1: one group finds an asked word, the other finds what followed it."""
    seen = heads.seen
    heads.match("k", layer, 0, seen[0], 1.2)
    heads.read(layer, 0, seen[2] + seen[3] + seen[4])
    heads.match("k", layer, 1, seen[2] + seen[3] + seen[4], 1.2)
    heads.read(layer, 1, seen[0])
    for head in range(N_HEADS):
        heads.match("q", layer, head, seen[(1, 1, 2, 0)[head % _GROUP]], 1.2)
        heads.write(layer, head, heads.words, 0.1)
