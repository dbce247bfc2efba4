"""Delegates of the engine's methods, by model: the last users go, then this file."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tl_headnorm.engine.protocol import Pass, Prefix, Start
from tl_headnorm.engine.select import engine_of

__all__ = ["Pass", "Prefix"]


def head_sum_name(tl: Any, layer: int) -> str:
    return engine_of(tl).head_sum_name(layer)


def W_O(tl: Any, layer: int) -> Tensor:
    return engine_of(tl).W_O(layer)


def b_O(tl: Any, layer: int) -> Tensor:
    return engine_of(tl).b_O(layer)


def can_share_prefix(tl: Any) -> bool:
    return engine_of(tl).shares_prefix


def run_prefix(tl: Any, ids: Sequence[int], *, reads: Any = ("z",), take: Any = None) -> Prefix:
    return engine_of(tl).run_prefix(ids, reads=reads, on_layer=take)


def run_layers(tl: Any, ids: Tensor, mask: Tensor, take: Any, **how: Any) -> Tensor:
    return engine_of(tl).run_layers(ids, mask, take, **how)


def past_values(tl: Any, prefix: Prefix, layer: int) -> Tensor:
    return engine_of(tl).prefix_values(prefix, layer)


def answer_directions(tl: Any, *given: Tensor) -> Tensor:
    return engine_of(tl).answer_directions(*given)


def final_scale(tl: Any, resid: Tensor) -> Tensor:
    return engine_of(tl).final_scale(resid)


def run_z(tl: Any, ids: Tensor, mask: Tensor, **how: Any) -> Pass:
    return engine_of(tl).run_z(ids, mask, **how)


def to_last_block(tl: Any, start: Tensor, mask: Tensor, *, start_layer: int = 0) -> Tensor:
    begin = Start(start) if start.dim() == 2 else Start(layer=start_layer, resid=start)
    return engine_of(tl).run(begin, mask)


def run_resid(tl: Any, ids: Tensor, mask: Tensor, *, prefix: Prefix | None = None) -> Tensor:
    return engine_of(tl).run(Start(ids), mask, prefix=prefix)


def logits(tl: Any, resid: Tensor) -> Tensor:
    return engine_of(tl).logits(resid)


def letter_logits(tl: Any, resid: Tensor, letter_ids: Tensor) -> Tensor:
    return engine_of(tl).token_logits(resid, letter_ids)


def zero_heads(tl: Any, heads: Sequence[tuple[int, int]]) -> Any:
    return engine_of(tl).zero_heads(heads)
