"""From a hub id, a directory or a GGUF file to a model and tokenizer, or one clear line."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tl_headnorm.engine.families import FAMILIES
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.model.gguf import load_gguf
from tl_headnorm.model.gguf_header import is_gguf

# Kept in older checkpoints, computed by the model itself.
BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
           ".attention.masked_bias", ".position_ids")  # fmt: skip


def builtin(source: str) -> str:
    """The directory of a model that ships with the package (`builtin:tiny`), else the source."""
    if not source.startswith("builtin:"):
        return source
    if source == "builtin:smollm2":
        from tl_headnorm.builtin.downloads import existing

        return str(existing("smollm2"))
    if source != "builtin:tiny":
        raise InputError(f"model_path: expected builtin:tiny or builtin:smollm2, found {source!r}")
    from tl_headnorm.builtin import model_dir

    return str(model_dir())


def load_pretrained(
    source: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    revision: str | None,
    device_map: str | dict[str, Any] | None = None,
    pickled_weights: bool = False,
) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer; a directory is read without the network."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if is_gguf(source):
        return _reading(source, "GGUF file", lambda: load_gguf(source, dtype, device_map))
    local = _is_local(source)
    common = {
        "local_files_only": local or os.environ.get("HF_HUB_OFFLINE") == "1",
        "trust_remote_code": trust_remote_code,
        **({} if revision is None else {"revision": revision}),
    }
    where = str(Path(source).expanduser()) if local else source
    config = _reading(source, "config", lambda: AutoConfig.from_pretrained(where, **common))
    _check_architecture(config, source)
    check_not_quantized(config)
    if local and not pickled_weights:
        refuse_pickled(Path(where), "model_path")
    spread = {} if device_map is None else {"device_map": device_map}
    model, report = _reading(
        source,
        "weights",
        lambda: AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=None if pickled_weights else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and named below
            **spread,
            **common,
        ),
    )
    _check_tensors(source, report)
    tokenizer = _reading(
        source, "tokenizer", lambda: AutoTokenizer.from_pretrained(where, **common)
    )
    _check_vocabulary(source, model, tokenizer)
    return model, tokenizer


def _check_tensors(source: str, report: Mapping[str, Any]) -> None:
    """Refuse weights of other sizes than the config's, missing ones, and ones that would not run.

    Buffers that older checkpoints hold, and the model computes itself, pass.
    """
    wrong = [
        f"{name} {tuple(a)} instead of {tuple(b)}"
        for name, a, b in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise InputError(
            f"model_path: expected tensors of the sizes in the config of {source}, found "
            f"{len(wrong)} other ({', '.join(wrong[:2])}); mend config.json, or load the weights "
            "it belongs to"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"model_path: expected all tensors of the architecture in {source}, found "
            f"{len(missing)} missing ({', '.join(missing[:3])})"
        )
    unknown = sorted(key for key in report["unexpected_keys"] if not key.endswith(BUFFERS))
    if unknown:
        raise InputError(
            f"model_path: expected no tensors but the architecture's in {source}, found "
            f"{len(unknown)} more ({', '.join(unknown[:3])}), which would not be run; mend "
            "config.json, or save the model anew"
        )


def _check_vocabulary(source: str, model: Any, tokenizer: Any) -> None:
    known, rows = tokenizer.vocab_size, model.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise InputError(
            f"model_path: expected a tokenizer of at most the embedding's {rows} tokens in "
            f"{source}, found {known}; it is another model's"
        )


def refuse_pickled(folder: Path, setting: str) -> None:
    """Raise InputError where the weights of a directory are there as pickle alone."""
    if any(folder.glob("*.safetensors")):
        return
    found = sorted(p.name for end in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{end}"))
    if found:
        raise InputError(
            f"{setting}: expected weights as safetensors in {folder}, found pickled ones "
            f"({found[0]}), which can hold code that runs when they are read; save the model anew "
            "with save_pretrained(..., safe_serialization=True), or pass --pickled_weights true "
            "if you trust their source"
        )


def _is_local(source: str) -> bool:
    """Whether `source` means a directory; one that should exist and does not is an error."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"; give its GGUF file: --model_path {path / files[0]}" if files else ""
            raise InputError(
                f"model_path: expected a directory in Hugging Face format, found no config.json "
                f"in {source}{hint}"
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
    """Refuse what is no decoder before its weights are read."""
    named = (config.architectures or [""])[0]
    if named and not named.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(
            f"model_path: expected an architecture among {', '.join(sorted(FAMILIES))}, or another "
            f"decoder-only language model for the bridge, found {named} in {source}"
        )


def _reading(source: str, what: str, read: Callable[[], Any]) -> Any:
    """Run a loader of transformers; whatever it raises becomes one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return read()
    except InputError:
        raise
    except Exception as error:  # transformers raises of every kind on a damaged directory
        advice = "expected a directory in Hugging Face format, a cached model, or a hub id that "
        advice += "can be reached"
        if "trust_remote_code" in str(error):
            advice = "its repository brings code of its own: read it, then pass "
            advice += "--trust_remote_code true if you trust it"
        elif "safetensors" in str(error):
            advice += " (pickled weights are read with --pickled_weights true)"
        raise InputError(
            f"model_path: the {what} of {source} could not be read: {first_line(error)}; {advice}"
        ) from error
    finally:
        logging.set_verbosity(level)


def check_not_quantized(config: Any, model: Any = None) -> None:
    """Refuse 8-bit and 4-bit weights.

    Their W_O is held as packed integers with scales per block: z W_O read from it is not what
    the model adds to its residual stream, and z itself is that of rounded weights. A GGUF model
    that transformers has dequantised is let pass: all its parameters are floats.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    as_dict = found if isinstance(found, dict) else found.to_dict()
    method = getattr(as_dict.get("quant_method"), "value", as_dict.get("quant_method"))
    floats = model is not None and all(p.is_floating_point() for p in model.parameters())
    if method == "gguf" and floats:
        return
    raise InputError(
        "model: expected weights in bf16, fp16 or fp32, found quantized ones "
        f"({method or 'of an unknown kind'}), whose packed W_O gives no "
        "norms that hold for the model; load the model it was made from"
    )
