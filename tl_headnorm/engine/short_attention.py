"""Attention of the bridge without its weights in full, where none of them is watched.

TransformerBridge computes scores and pattern step by step so that both can be hooked. Where
neither is, and the model's own attention holds the bridge's projections, that runs instead, by
torch's scaled_dot_product_attention: queries, keys, values and z are hooked as before.
"""

import copy
from typing import Any

from tl_headnorm.engine.short_blocks import watched

FIRED = ("hook_in", "hook_out")
PROJECTIONS = ("q", "k", "v", "o")


def knows(attn: Any, hf_model: Any) -> bool:
    """Whether a layer's attention is the same by scaled_dot_product_attention, hooks included."""
    inner = getattr(attn, "original_component", None)
    own = list(inner.children()) if inner is not None else []
    return bool(
        getattr(hf_model, "_supports_sdpa", False)
        and all(any(getattr(attn, name, None) is part for part in own) for name in PROJECTIONS)
        and hasattr(inner, "config")
        and getattr(inner, "attn_logit_softcapping", None) is None
        and getattr(inner, "sinks", None) is None
    )


def install(bridge: Any) -> None:
    """Give every layer that is known the short attention, and a config of its own that asks it."""
    hf_model = bridge.original_model
    configs: dict[int, Any] = {}
    for block in bridge.blocks:
        attn = getattr(block, "attn", None)
        if attn is None or not knows(attn, hf_model):
            continue
        inner = attn.original_component
        key = id(inner.config)
        if key not in configs:
            configs[key] = copy.copy(inner.config)
            configs[key]._attn_implementation = "sdpa"
        inner.config = configs[key]
        # past torch's and the bridge's own __setattr__
        object.__setattr__(attn, "forward", _forward(attn))


def uninstall(bridge: Any) -> None:
    """Back to the stock forward."""
    for block in bridge.blocks:
        if "forward" in block.attn.__dict__:
            object.__delattr__(block.attn, "forward")


def _forward(attn: Any) -> Any:
    stock, inner = attn.forward, attn.original_component
    silent = [
        module
        for name, module in attn.named_children()
        if type(module).__name__ == "HookPoint" and name not in FIRED
    ]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(map(watched, silent)):
            return stock(*args, **kwargs)
        if args:
            args = (attn.hook_in(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = attn.hook_in(kwargs["hidden_states"])
        out, *rest = inner(*args, **kwargs)
        return attn.hook_out(out), *rest

    return forward
