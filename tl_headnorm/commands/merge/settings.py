"""Settings of `merge`."""

from dataclasses import dataclass
from pathlib import Path

from tl_headnorm.bounds import Checked, DirName, OneLine
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class MergeSettings(Checked):
    """Settings of a merge of run directories.

    Args:
        runs: Finished run directories of collect, or of merge.
        output_dir: Where the merged run directory is made.
        experiment_name: First part of its name.
        debug: Show the traceback of an error.
    """

    runs: list[str]
    output_dir: OneLine = "outputs"
    experiment_name: DirName = "merged"
    debug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 2:
            raise InputError(
                f"merge: expected two run directories or more, found {len(self.runs)}; use "
                "tl-headnorm merge DIR DIR ..."
            )
        first: dict[Path, str] = {}
        for run in self.runs:
            path = Path(run).expanduser().resolve()
            if path in first:
                raise InputError(
                    f"merge: expected different run directories, found {run} again (as "
                    f"{first[path]}); name each once"
                )
            first[path] = run
