"""Settings of `fetch`."""

from dataclasses import dataclass, field

from tl_headnorm.builtin.downloads import DOWNLOADS
from tl_headnorm.errors import InputError, unknown


@dataclass(frozen=True)
class FetchSettings:
    """Settings of fetch.

    Args:
        models: Names of the models to get: smollm2.
        debug: Show the traceback of an error.
    """

    models: list[str] = field(default_factory=list)
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError(
                f"models: expected a model's name ({', '.join(DOWNLOADS)}), found none; give for "
                "example tl-headnorm fetch smollm2"
            )
        for name in self.models:
            if name not in DOWNLOADS:
                raise unknown("model", name, DOWNLOADS)
