"""The settings of a run that is resumed: its own, and what may be changed of them."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tl_headnorm.errors import InputError, first_line
from tl_headnorm.settings import Settings

STATE = ".state"
# How a run is carried out, not what comes out. Where the model and the questions lie may change
# too: what they hold may not, which is checked when they are open.
FREE = (
    "resume", "checkpoint_every", "device_map", "self_check", "validate_samples",
    "trust_remote_code", "pickled_weights", "debug", "model_path", "adapter_path", "data_dir",
)  # fmt: skip


def is_finished(folder: Path) -> bool:
    return (folder / "meta.json").is_file()


def settings_of(run_dir: str | Path) -> dict[str, Any]:
    """The settings in a run's config.json. Raises InputError where there is no run to resume."""
    folder = Path(run_dir).expanduser()
    if not folder.is_dir():
        raise InputError(f"resume: expected a run directory of collect, found nothing at {folder}")
    path = folder / "config.json"
    if not is_finished(folder) and not (folder / STATE).is_dir():
        raise InputError(
            f"resume: expected a directory that collect left unfinished, found no {STATE} in "
            f"{folder}; check the path, or start a new run"
        )
    if not path.is_file():
        raise InputError(
            f"resume: expected config.json in {folder}, found none: the run ended before it began "
            "to measure; start it again"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name: f for f in fields(Settings)}
        unknown = sorted(set(found) - set(known))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"resume: expected {path} as collect wrote it, found it damaged ({first_line(error)})"
        ) from None
    if unknown:
        raise InputError(
            f"resume: expected settings this version knows, found {', '.join(unknown)} in {path}; "
            "resume it with the version that began it"
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def resumed(run_dir: str | Path, given: Mapping[str, Any]) -> Settings:
    """The run's settings with those given that may change; the others are refused by name."""
    began = settings_of(run_dir)
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in FREE and name in began and value != began[name]:
            raise InputError(
                f"{name}: expected {_shown(began[name])}, as the run in {run_dir} began, found "
                f"{_shown(value)}; leave it out, or start a new run without --resume"
            )
    return Settings(**{**began, **given, "resume": str(run_dir)})


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
