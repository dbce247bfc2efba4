"""Loading: a hub id, a directory or a GGUF file becomes a model that proves itself."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tl_headnorm.engine.protocol import Engine
from tl_headnorm.engine.select import ENGINES, build, engine_of
from tl_headnorm.errors import InputError, first_line, nearest
from tl_headnorm.model.gguf import record as gguf_record
from tl_headnorm.model.gguf_header import is_gguf
from tl_headnorm.model.pretrained import builtin, check_not_quantized, load_pretrained

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# accelerate's ways to spread the layers over the devices; a dict places them one by one.
SPREADS = ("balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class ModelInfo:
    """The model's entry in meta.json."""

    source: str
    revision: str | None
    architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    dtype: str
    engine: str
    weight_processing: str = "none"
    adapter: str | None = None
    gguf: dict[str, Any] | None = None  # a dequantised file: name, types of tensors, sha256

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """A loaded model: `tl` runs it with hooks, `hf` holds the same weights as Hugging Face's.

    `tl` is a HookedTransformer or a TransformerBridge (`info.engine`). The two share their
    tensors, so both cost no more than one, and `hf` is the oracle.
    """

    tl: Any
    hf: Any
    tokenizer: Any
    info: ModelInfo

    def __repr__(self) -> str:
        """One line: the fields themselves would print every module and every token."""
        i = self.info
        return (
            f"Model({i.source}: {i.architecture}, {i.n_layers} layers x {i.n_heads} heads "
            f"({i.n_key_value_heads} key/value), d_model {i.d_model}, d_head {i.d_head}, "
            f"{i.dtype}, {i.engine}, {self.device})"
        )

    @cached_property
    def engine(self) -> Engine:
        """Runs the model: passes with hooks, weights, logits."""
        return engine_of(self.tl)

    @property
    def device(self) -> torch.device:
        return torch.device(self.tl.cfg.device)

    @property
    def n_ctx(self) -> int:
        return int(self.tl.cfg.n_ctx)


def load_model(
    source: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "bf16",
    engine: str = "auto",
    device_map: str | dict[str, Any] = "auto",
    self_check: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    hf_model: Any = None,
    tokenizer: Any = None,
    adapter_path: str | Path | None = None,
    pickled_weights: bool = False,
) -> Model:
    """Load a model from a hub id, a directory or a GGUF file, or take one in memory (`hf_model`).

    A directory or file never touches the network; a GGUF file's tensors are dequantised. Weights
    are not processed (no folding, no centring) and not copied; of GPT-2's and GPT-NeoX's
    attention a second layout is kept. A model given in memory is put in eval mode and its
    parameters no longer ask for gradients; its modules, its config and its weights stay as they
    are. With `adapter_path` a PEFT adapter is merged into a model that shares all other weights
    with the base.

    `engine`: hooked is HookedTransformer (transformer-lens 3.9), bridge is TransformerBridge,
    auto takes hooked where it is there and knows the family. `device_map` balanced, sequential
    or a dict of accelerate's spreads the layers over several devices, through the bridge: LLaMA
    70B has 70.6e9 parameters, in bf16 141 GB, so two devices of 80 GB with about 19 GB left for
    activations (four of 48 GB: 51 GB left).

    Code of the model's repository runs only with `trust_remote_code`, and weights stored as
    pickle are read only with `pickled_weights`.

    With `self_check` the model is compared with Hugging Face's own forward on a probe before it
    is returned. Raises InputError with one line on whatever is wrong.
    """
    spread = isinstance(device_map, dict) or device_map in SPREADS
    _check_engine(engine, device_map, spread)
    file = None
    if hf_model is None:
        if source is None:
            raise InputError("model_path: expected a hub id or a directory, found nothing")
        path, torch_dtype = builtin(str(source)), resolve_dtype(dtype)
        device = None if spread else resolve_device(str(device_map))
        if device is not None:
            check_dtype(torch_dtype, device)
        hf_model, own = load_pretrained(
            path, torch_dtype, trust_remote_code, revision, device_map if spread else None,
            pickled_weights,
        )  # fmt: skip
        hf_model = hf_model if device is None else hf_model.to(device)
        tokenizer = own if tokenizer is None else tokenizer
        file = gguf_record(path) if is_gguf(path) else None
    check_not_quantized(hf_model.config, hf_model)
    check_placement(hf_model)
    hf_model.eval().requires_grad_(False)
    source = str(source or hf_model.config.name_or_path or "in memory")
    if adapter_path is not None:
        from tl_headnorm.model.adapters import merged

        hf_model = merged(hf_model, str(adapter_path), pickled_weights=pickled_weights)
    tl, used = build(hf_model, tokenizer, engine)
    info = _info(hf_model, tl, source, revision, used, adapter_path, file)
    model = Model(tl=tl, hf=hf_model, tokenizer=tokenizer, info=info)
    if self_check:
        from tl_headnorm.model.self_check import check_model

        check_model(model)
    return model


def _check_engine(engine: str, device_map: str | dict[str, Any], spread: bool) -> None:
    if engine not in ENGINES:
        raise InputError(
            f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}"
            f"{nearest(engine, ENGINES)}"
        )
    if spread and engine == "hooked":
        raise InputError(
            "device_map: expected one device for HookedTransformer, found "
            f"{device_map!r}; use --engine bridge, or --device_map cuda"
        )


def check_placement(hf_model: Any) -> None:
    """Refuse layers that were put on the disk, or on the CPU beside a GPU, for want of memory."""
    places = {str(place) for place in (getattr(hf_model, "hf_device_map", None) or {}).values()}
    outside = places & {"disk", "meta"} or (places & {"cpu"} if len(places) > 1 else set())
    if outside:
        raise InputError(
            "device_map: expected all layers on the devices, found some put on "
            f"{', '.join(sorted(outside))} for want of memory; use more or larger devices, "
            "--dtype bf16, or --device_map cpu"
        )


def commit_of(source: str, revision: str | None = None) -> str | None:
    """Commit of a hub id, read off the cache its files were just loaded from; None elsewhere."""
    from huggingface_hub import try_to_load_from_cache

    if source.count("/") != 1 or Path(source).expanduser().exists():
        return None
    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """bf16, fp16, fp32, fp64 or a torch dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(
            f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}{nearest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def resolve_device(device_map: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU; anything else as torch names devices."""
    if device_map == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"device_map: expected auto, cpu or a device that is here, found {device_map!r} "
            f"({first_line(error)})"
        ) from None
    return device


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError where the device cannot multiply matrices of that type."""
    try:
        probe = torch.ones(2, 2, dtype=dtype, device=device)
        torch.nn.functional.softmax(probe @ probe, dim=-1)
    except (RuntimeError, TypeError) as error:
        name = next(name for name, value in DTYPES.items() if value == dtype)
        raise InputError(
            f"dtype: expected one that {device.type} computes, found {name} "
            f"({first_line(error)}); use --dtype bf16 or --dtype fp32"
        ) from None


def _info(
    hf_model: Any,
    tl: Any,
    source: str,
    revision: str | None,
    engine: str,
    adapter_path: str | Path | None,
    gguf: dict[str, Any] | None,
) -> ModelInfo:
    cfg = tl.cfg
    return ModelInfo(
        source=source,
        revision=commit_of(source, revision) or revision,
        architecture=type(hf_model).__name__,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        dtype=next((n for n, t in DTYPES.items() if t == hf_model.dtype), str(hf_model.dtype)),
        engine=engine,
        adapter=None if adapter_path is None else str(adapter_path),
        gguf=gguf,
    )
