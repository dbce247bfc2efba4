"""Settings of `report`."""

from dataclasses import dataclass, field
from typing import Annotated

from tl_headnorm.bounds import Bound, Checked

_some = Bound(len, "one run directory or more", "for example tl-headnorm report outputs/RUN")


@dataclass(frozen=True)
class ReportSettings(Checked):
    """Settings of a report.

    Args:
        runs: Run directories; each gets its report.html written anew.
        texts: Read the questions again, so that the page shows them; false leaves them out.
        debug: Show the traceback of an error.
    """

    runs: Annotated[list[str], _some] = field(default_factory=list)
    texts: bool = True
    debug: bool = False
