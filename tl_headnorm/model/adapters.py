"""PEFT adapters, merged into a model without touching the one they were trained on."""

import warnings
from pathlib import Path
from typing import Any

from tl_headnorm.engine.bridge import twin
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.model.pretrained import refuse_pickled


def merged(hf_model: Any, adapter_path: str, *, pickled_weights: bool = False) -> Any:
    """The model with an adapter merged into its weights; `hf_model` keeps its own.

    Only the weights the adapter changes take memory anew. Raises InputError for an adapter that
    cannot be read or was made for another model.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(
            "adapter_path: expected the package peft to be installed, found none; "
            "pip install 'tl-headnorm[peft]'"
        ) from None
    path = Path(adapter_path).expanduser()
    looks_local = adapter_path.startswith((".", "/", "~")) or adapter_path.count("/") != 1
    if (path.exists() or looks_local) and not (path / "adapter_config.json").is_file():
        raise InputError(
            f"adapter_path: expected a PEFT adapter's directory or hub id, found no "
            f"adapter_config.json in {adapter_path}; check the path"
        )
    if path.is_dir() and not pickled_weights:
        refuse_pickled(path, "adapter_path")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            where = str(path) if path.exists() else adapter_path
            adapted = PeftModel.from_pretrained(twin(hf_model), where)
            # safe_merge computes on a copy, refuses NaN, and then replaces the weight.
            result = adapted.merge_and_unload(safe_merge=True)
        except Exception as error:  # peft and torch raise of every kind on a misfit
            raise InputError(
                f"adapter_path: expected an adapter for {type(hf_model).__name__} of this size, "
                f"found one that does not fit: {first_line(error)}"
            ) from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise InputError(
            f"adapter_path: expected weights for every adapted layer in {adapter_path}, found "
            f"some missing: {missing[0][:200]}"
        )
    return result.eval().requires_grad_(False)
