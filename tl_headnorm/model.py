"""Loading: a hub id or a directory in Hugging Face format becomes a model that proves itself."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tl_headnorm.errors import InputError, first_line, nearest
from tl_headnorm.families import FAMILIES, build_hooked

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class ModelInfo:
    """What meta.json says of the model."""

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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """A loaded model: `tl` is the HookedTransformer, `hf` the same weights as Hugging Face's.

    The two share their tensors, so keeping both costs nothing, and `hf` is the oracle.
    """

    tl: Any
    hf: Any
    tokenizer: Any
    info: ModelInfo

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
    device_map: str = "auto",
    self_check: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    hf_model: Any = None,
    tokenizer: Any = None,
) -> Model:
    """Load a model from a hub id or a directory, or take over one in memory (`hf_model`).

    A directory never touches the network. Weights are not processed (no folding, no centring)
    and not copied. With `self_check` the model is compared with Hugging Face's own forward on a
    probe before it is returned. Raises InputError with one line on whatever is wrong.
    """
    if engine not in ("auto", "hooked"):
        raise InputError(f"engine: expected auto or hooked, found {engine!r}")
    if hf_model is None:
        if source is None:
            raise InputError("model_path: expected a hub id or a directory, found nothing")
        torch_dtype = resolve_dtype(dtype)
        device = resolve_device(device_map)
        check_dtype(torch_dtype, device)
        loaded = _load_pretrained(_builtin(str(source)), torch_dtype, trust_remote_code, revision)
        hf_model = loaded[0].to(device)
        tokenizer = tokenizer if tokenizer is not None else loaded[1]
    hf_model.eval().requires_grad_(False)
    model = Model(
        tl=build_hooked(hf_model, tokenizer),
        hf=hf_model,
        tokenizer=tokenizer,
        info=_info(hf_model, str(source or hf_model.config.name_or_path or "in memory"), revision),
    )
    if self_check:
        from tl_headnorm.selfcheck import check_model

        check_model(model)
    return model


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


def _builtin(source: str) -> str:
    """The directory of a model that ships with the package (`builtin:tiny`), else the source."""
    if not source.startswith("builtin:"):
        return source
    if source != "builtin:tiny":
        raise InputError(f"model_path: expected builtin:tiny, found {source!r}")
    from tl_headnorm.tiny import model_dir

    return str(model_dir())


def _load_pretrained(
    source: str, dtype: torch.dtype, trust_remote_code: bool, revision: str | None
) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer; a directory is read without the network."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = _is_local(source)
    common = {
        "local_files_only": local or os.environ.get("HF_HUB_OFFLINE") == "1",
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    if revision is None:
        del common["revision"]
    where = str(Path(source).expanduser()) if local else source
    config = _reading(source, "config", lambda: AutoConfig.from_pretrained(where, **common))
    _check_architecture(config, source)
    model, report = _reading(
        source,
        "weights",
        lambda: AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **common,
        ),
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"model_path: expected all tensors of the architecture in {source}, found "
            f"{len(missing)} missing ({', '.join(missing[:3])})"
        )
    tokenizer = _reading(
        source, "tokenizer", lambda: AutoTokenizer.from_pretrained(where, **common)
    )
    return model, tokenizer


def _is_local(source: str) -> bool:
    """Whether `source` means a directory; one that should exist and does not is an error."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"model_path: expected a directory in Hugging Face format, found no config.json "
                f"in {source}"
            )
        return True
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or path.exists()
    if looks_local:
        raise InputError(
            f"model_path: expected a hub id (owner/name) or an existing directory, found nothing "
            f"at {source}; check the path"
        )
    return False


def _check_architecture(config: Any, source: str) -> None:
    architecture = (config.architectures or [type(config).__name__])[0]
    if architecture not in FAMILIES:
        raise InputError(
            f"model_path: expected an architecture among {', '.join(sorted(FAMILIES))}, found "
            f"{architecture} in {source}"
        )


def _reading(source: str, what: str, read: Callable[[], Any]) -> Any:
    """Run a loader of transformers; whatever it raises becomes one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return read()
    except Exception as error:  # transformers raises of every kind on a damaged directory
        raise InputError(
            f"model_path: the {what} of {source} could not be read: {first_line(error)}; expected "
            "a directory in Hugging Face format, a cached model, or a hub id that can be reached"
        ) from error
    finally:
        logging.set_verbosity(level)


def _info(hf_model: Any, source: str, revision: str | None) -> ModelInfo:
    config = hf_model.config
    heads = config.num_attention_heads
    return ModelInfo(
        source=source,
        revision=revision or getattr(config, "_commit_hash", None),
        architecture=type(hf_model).__name__,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        d_model=config.hidden_size,
        dtype=next((n for n, t in DTYPES.items() if t == hf_model.dtype), str(hf_model.dtype)),
        engine="hooked",
    )
