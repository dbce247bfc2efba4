"""Settings of `report`."""

from dataclasses import dataclass, field

from tl_headnorm.bounds import Checked
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class ReportSettings(Checked):
    """Settings of a report.

    Args:
        runs: Run directories; each gets its report.html written anew.
        texts: Read the questions again, so that the page shows them; false leaves them out.
        debug: Show the traceback of an error.
    """

    runs: list[str] = field(default_factory=list)
    texts: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise InputError(
                "runs: expected one run directory or more, found none; for example "
                "tl-headnorm report outputs/RUN"
            )
