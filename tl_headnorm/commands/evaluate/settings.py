"""Settings of `evaluate`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tl_headnorm.settings import BATCHES, STUDY, Settings


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """Settings of an evaluation: those of a run, and how answers are scored.

    Args:
        scoring: letter takes the best next letter, cloze the likeliest option text.
        template_name: Registered template; auto takes arc_mcq_v1 or, for cloze, cloze.
    """

    scoring: Literal["letter", "cloze"] = "letter"
    template_name: str = "auto"
    uses: ClassVar = (*STUDY, *BATCHES)
