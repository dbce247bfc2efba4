"""TransformerLens' hook points by name; the only file that spells them. Both engines use them."""


def z(layer: int) -> str:
    """Each head's output before W_O, [batch, pos, head, d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def q(layer: int) -> str:
    """Queries, [batch, pos, head, d_head], before the rotary embedding."""
    return f"blocks.{layer}.attn.hook_q"


def k(layer: int) -> str:
    """Keys, [batch, pos, key_value_head, d_head], before the rotary embedding."""
    return f"blocks.{layer}.attn.hook_k"


def v(layer: int) -> str:
    """Values, [batch, pos, key_value_head, d_head]."""
    return f"blocks.{layer}.attn.hook_v"


def scores(layer: int) -> str:
    """Attention scores before the softmax, [batch, head, query, key]."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def pattern(layer: int) -> str:
    """Attention weights, [batch, head, query, key]."""
    return f"blocks.{layer}.attn.hook_pattern"


def attn_out(layer: int) -> str:
    """Attention's output, added to the residual stream, [batch, pos, d_model]."""
    return f"blocks.{layer}.hook_attn_out"


def mlp_out(layer: int) -> str:
    """The MLP's output, added to the residual stream, [batch, pos, d_model]."""
    return f"blocks.{layer}.hook_mlp_out"


def resid_pre(layer: int) -> str:
    """The residual stream before a block, [batch, pos, d_model]."""
    return f"blocks.{layer}.hook_resid_pre"


def resid_post(layer: int) -> str:
    """The residual stream after a block, [batch, pos, d_model]."""
    return f"blocks.{layer}.hook_resid_post"
