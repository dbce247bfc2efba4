"""Settings of `fetch`."""

from dataclasses import dataclass, field
from typing import Annotated

from tl_headnorm.bounds import Checked, OneOf
from tl_headnorm.builtin.downloads import DOWNLOADS


@dataclass(frozen=True)
class FetchSettings(Checked):
    """Settings of fetch.

    Args:
        models: Names of the models to get: smollm2.
        debug: Show the traceback of an error.
    """

    models: Annotated[list[str], OneOf("model", tuple(DOWNLOADS))] = field(default_factory=list)
    debug: bool = False
