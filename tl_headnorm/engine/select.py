"""The choice of the engine: HookedTransformer where it knows the model, else TransformerBridge."""

import logging
from typing import Any

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
