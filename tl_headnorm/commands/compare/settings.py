"""Settings of `compare`."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from tl_headnorm.bounds import Bound, Checked, Count, DirName, Fraction, OneLine
from tl_headnorm.errors import InputError

_two = Bound(
    lambda names: len(set(names)) == 2, "two different names", "use for example --names base,tuned"
)


@dataclass(frozen=True)
class CompareSettings(Checked):
    """Settings of a comparison of two runs.

    Args:
        runs: Two run directories: what is compared to, and what is compared.
        names: What to call the two, such as base,tuned; null takes the directories' names.
        top: Heads listed among those that changed most.
        fdr: Share of false discoveries allowed among the heads called changed.
        output_dir: Where the directory of the comparison is made.
        experiment_name: First part of its name.
        debug: Show the traceback of an error.
    """

    runs: list[str] = field(default_factory=list)
    names: Optional[Annotated[list[str], _two]] = None
    top: Count = 10
    fdr: Fraction = 0.05
    output_dir: OneLine = "outputs"
    experiment_name: DirName = "compare"
    debug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) != 2:
            found = ", ".join(self.runs) or "none"
            raise InputError(
                f"compare: expected two run directories, found {len(self.runs)} ({found}); use "
                "tl-headnorm compare RUN_A RUN_B"
            )
