"""How many tokens fit, and what to do when they did not."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from tl_headnorm.errors import InputError, first_line

# Of the free memory, what one forward pass may plan with: the rest is fragmentation's.
SHARE = 0.5

Rows = TypeVar("Rows", bound=Sequence)
Result = TypeVar("Result")


def bytes_per_token(model: Any) -> int:
    """Activations one padded token holds at the widest moment of a pass, rounded up.

    z of every layer, the block's own d_model vectors, the gated MLP's three d_mlp vectors, and
    scores against as many keys as a long prompt has.
    """
    cfg = model.tl.cfg
    size = torch.finfo(cfg.dtype).bits // 8
    width = cfg.n_heads * cfg.d_head
    d_mlp = cfg.d_mlp or 0
    scores = cfg.n_heads * min(cfg.n_ctx, 1024)
    numbers = cfg.n_layers * width + 6 * width + 8 * cfg.d_model + 3 * d_mlp + 2 * scores
    return int(size * numbers + 4 * 4 * width)


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, else of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def auto_batch_tokens(model: Any) -> int:
    """Padded tokens per pass that half the free memory holds, at least one prompt's worth."""
    return max(512, int(SHARE * free_bytes(model.device)) // bytes_per_token(model))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch gave up for want of memory, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halving_on_oom(
    rows: Rows, run: Callable[[Rows], Result], n_tokens: int | None = None
) -> Iterator[tuple[Rows, Result]]:
    """(part, run(part)) of all rows at once or, where that does not fit in memory, of their
    halves in order, as often as needed.

    A row is a prompt, or anything else of `n_tokens` tokens, which an error names. Raises
    InputError where a single row does not fit.
    """
    pending = [rows]
    while pending:
        part = pending.pop()
        try:
            result = run(part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = error.with_traceback(None)  # it would hold the failed pass's tensors
        else:
            yield part, result
            continue
        pending.extend(reversed(split(part, n_tokens or len(part[0]), reason)))


def split(rows: Rows, n_tokens: int, error: RuntimeError) -> list[Rows]:
    """Rows of `n_tokens` that did not fit, in two; InputError where it is a single row already."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) == 1:
        raise InputError(
            f"memory: expected room for one prompt of {n_tokens} tokens, found too little "
            f"({first_line(error)}); lower --max_length or use --dtype bf16"
        ) from error
    middle = (len(rows) + 1) // 2
    return [rows[:middle], rows[middle:]]  # type: ignore[list-item]  # a slice is of its kind
