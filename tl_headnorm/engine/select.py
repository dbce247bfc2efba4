"""The choice of the engine: HookedTransformer where it knows the model, else TransformerBridge."""

import logging
from typing import Any

import torch

from tl_headnorm.engine import short_attention, short_blocks
from tl_headnorm.engine.bridge import BridgeEngine, build_bridge
from tl_headnorm.engine.families import Unsupported, build_hooked, has_hooked
from tl_headnorm.engine.hooked import HookedEngine
from tl_headnorm.engine.protocol import Engine

ENGINES = ("auto", "hooked", "bridge")
_said: set[str] = set()


def engine_of(tl: Any) -> Engine:
    """The engine of a HookedTransformer or a TransformerBridge."""
    return BridgeEngine(tl) if type(tl).__name__ == "TransformerBridge" else HookedEngine(tl)


def build(hf_model: Any, tokenizer: Any, engine: str) -> tuple[Any, str]:
    """The TransformerLens model of the engine asked for (one of ENGINES), and its name."""
    why = _not_hooked(hf_model)
    if engine != "bridge" and why is None:
        try:
            return build_hooked(hf_model, tokenizer), "hooked"
        except Unsupported as reason:
            if engine == "hooked":
                raise
            found = str(reason).split("found ", 1)[-1].split(",")[0]
            why = f"HookedTransformer does not compute {found}"
    if engine == "hooked":
        if has_hooked():
            raise Unsupported("a model on one device", "one on several")
        return build_hooked(hf_model, tokenizer), "hooked"  # says why not
    if engine == "auto":
        _say_once(f"engine: bridge ({why})")
    return build_bridge(hf_model, tokenizer), "bridge"


def stock_model(hf_model: Any, tokenizer: Any) -> Any:
    """TransformerLens' model as its loader makes it: HookedTransformer, where there is one.

    Its weights are copies in TransformerLens' own layout; a TransformerBridge's are the model's.
    """
    if not has_hooked():
        bridge = build_bridge(hf_model, tokenizer)
        short_attention.uninstall(bridge)
        return bridge
    hooked = build_hooked(hf_model, tokenizer)
    short_blocks.uninstall(hooked)
    for parameter in hooked.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return hooked


def without_short_forms(hf_model: Any, tokenizer: Any, engine: str) -> Any:
    """The model as `build` makes it, but every pass through TransformerLens' own forward."""
    tl, used = build(hf_model, tokenizer, engine)
    (short_attention if used == "bridge" else short_blocks).uninstall(tl)
    return tl


def _not_hooked(hf_model: Any) -> str | None:
    """Why no HookedTransformer can be built, whatever the family."""
    if not has_hooked():
        return "this transformer-lens has no HookedTransformer"
    if len({p.device for p in hf_model.parameters()}) > 1:
        return "the model lies on several devices"
    return None


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logging.getLogger("tl_headnorm").warning(text)
