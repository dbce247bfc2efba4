"""TransformerLens' bridge around a Hugging Face model that stays as it was.

TransformerBridge puts its own modules into the model it is given and wants eager attention. It
gets a twin: modules of its own on the same tensors.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_headnorm.errors import InputError, first_line


def twin(hf_model: Any) -> Any:
    """A copy of the modules and the config, with parameters of its own on the same tensors.

    No memory is taken, and a parameter of the twin may be given other data without the
    original's noticing. Tied parameters stay tied.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in hf_model.buffers()}
    memo |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in hf_model.parameters()}
    return copy.deepcopy(hf_model, memo)


def is_bridge(tl: Any) -> bool:
    return type(tl).__name__ == "TransformerBridge"


def build_bridge(hf_model: Any, tokenizer: Any) -> Any:
    """A TransformerBridge on the model's own tensors; the model itself is not touched.

    Raises InputError for an architecture the installed transformer-lens has no bridge for.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(hf_model).__name__
    inner = twin(hf_model)
    inner.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on settings that we make ourselves
            bridge = build_bridge_from_module(
                inner,
                architecture,
                hf_config=inner.config,
                tokenizer=None,  # a tokenizer given here would be changed
                device=hf_model.device,
                model_name=architecture,
            )
    except (ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"model: expected an architecture that TransformerBridge or HookedTransformer knows, "
            f"found {architecture} ({first_line(error)})"
        ) from error
    places = {p.device for p in inner.parameters()}
    bridge.cfg.n_devices = len(places)
    bridge.tokenizer = tokenizer
    return bridge.eval().requires_grad_(False)


@contextmanager
def stopping_after_blocks(bridge: Any) -> Iterator[None]:
    """While inside, a forward pass ends before the final norm and gives what would enter it."""
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(resid: Tensor, hook: Any) -> None:
        raise StopAtLayerException(resid)

    with bridge.hooks(fwd_hooks=[("ln_final.hook_in", stop)]):
        yield


@contextmanager
def beginning_at(bridge: Any, layer: int, resid: Tensor) -> Iterator[None]:
    """While inside, `resid` stands before `layer`, whatever the layers below it made.

    It is put in before the block's own hook points, so that all of them see it.
    """

    def put(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (resid.to(args[0].device), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": resid.to(kwargs["hidden_states"].device)}

    handle = bridge.blocks[layer].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def real_tokens_last(mask: Tensor) -> Tensor:
    """Per row an order of its positions, pads first: padding anywhere becomes left padding."""
    return torch.argsort(mask, dim=1, stable=True)
