"""Which engine runs a TransformerLens model."""

from typing import Any

from tl_headnorm.engine.bridge import BridgeEngine
from tl_headnorm.engine.hooked import HookedEngine
from tl_headnorm.engine.protocol import Engine


def engine_of(tl: Any) -> Engine:
    """The engine of a HookedTransformer or a TransformerBridge."""
    return BridgeEngine(tl) if type(tl).__name__ == "TransformerBridge" else HookedEngine(tl)
