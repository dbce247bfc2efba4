"""The settings of `merge`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge of run directories.

    Args:
        runs: Finished run directories of collect, or of merge.
        output_dir: Where the merged run directory is made.
        experiment_name: First part of its name.
        debug: Show the traceback of an error.
    """

    runs: list[str]
    output_dir: str = "outputs"
    experiment_name: str = "merged"
    debug: bool = False

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise InputError(
                f"merge: expected two run directories or more, found {len(self.runs)}; use "
                "tl-headnorm merge DIR DIR ..."
            )
        seen: dict[Path, str] = {}
        for run in self.runs:
            path = Path(run).expanduser().resolve()
            if path in seen:
                raise InputError(
                    f"merge: expected different run directories, found {run} again (as "
                    f"{seen[path]}); name each once"
                )
            seen[path] = run
        if not self.experiment_name or "/" in self.experiment_name:
            raise InputError(
                f"experiment_name: expected a name without '/', found {self.experiment_name!r}; "
                "use --output_dir to choose the folder"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
