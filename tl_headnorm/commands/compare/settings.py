"""The settings of `compare`."""

from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison of two runs.

    Args:
        runs: Two run directories: what is compared to, and what is compared.
        names: What to call the two, such as '[base, tuned]'; null takes the directories' names.
        top: Heads listed among those that changed most.
        fdr: Share of false discoveries allowed among the heads called changed.
        output_dir: Where the directory of the comparison is made.
        experiment_name: First part of its name.
        debug: Show the traceback of an error.
    """

    runs: list[str] = field(default_factory=list)
    names: Optional[list[str]] = None
    top: int = 10
    fdr: float = 0.05
    output_dir: str = "outputs"
    experiment_name: str = "compare"
    debug: bool = False

    def __post_init__(self) -> None:
        if len(self.runs) != 2:
            found = ", ".join(self.runs) or "none"
            raise InputError(
                f"compare: expected two run directories, found {len(self.runs)} ({found}); use "
                "tl-headnorm compare RUN_A RUN_B"
            )
        if self.names is not None and len(set(self.names)) != 2:
            raise InputError(
                f"names: expected two different names, found {self.names}; use for example "
                "--names '[base, tuned]'"
            )
        if self.top < 1:
            raise InputError(f"top: expected 1 or more, found {self.top}")
        if not 0 < self.fdr < 1:
            raise InputError(
                f"fdr: expected a share between 0 and 1, found {self.fdr}; 0.05 is usual"
            )
        if not self.experiment_name or "/" in self.experiment_name:
            raise InputError(
                f"experiment_name: expected a name without '/', found {self.experiment_name!r}; "
                "use --output_dir to choose the folder"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json."""
        return asdict(self)
