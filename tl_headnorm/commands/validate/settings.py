"""Settings of `validate`."""

from dataclasses import dataclass
from typing import ClassVar

from tl_headnorm.settings import BATCHES, SAMPLES, STUDY, TOKENS, Settings


@dataclass(frozen=True)
class ValidateSettings(Settings):
    """Settings of a comparison with Hugging Face: those of a run.

    Args:
        table: Print the worst difference of every family and engine, on small random models.
    """

    table: bool = False
    uses: ClassVar = (*STUDY, *BATCHES, *TOKENS, *SAMPLES)
