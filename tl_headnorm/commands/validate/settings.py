"""Settings of `validate`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tl_headnorm.settings import BATCHES, SAMPLES, STUDY, TOKENS, Settings


@dataclass(frozen=True)
class ValidateSettings(Settings):
    """Settings of a comparison with Hugging Face: those of a run.

    Args:
        reference_dtype: In bf16 and fp16, compare both with Hugging Face in fp32, too; auto does
            where memory allows, same compares with Hugging Face in the run's data type alone.
        table: Print the worst difference of every family and engine, on small random models.
    """

    reference_dtype: Literal["auto", "fp32", "same"] = "auto"
    table: bool = False
    uses: ClassVar = (*STUDY, *BATCHES, *TOKENS, *SAMPLES)
