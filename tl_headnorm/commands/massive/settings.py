"""Settings of `massive`."""

from dataclasses import dataclass
from typing import Optional

from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings, among, at_least, needs_data


@dataclass(frozen=True)
class MassiveSettings(Settings):
    """Settings of the study of massive activations: those of a run, and what counts as massive.

    Args:
        dataset: Registered dataset name, or none; accuracy is measured where there is one.
        texts: Text file or .jsonl of texts; without it the prompts of the dataset are taken.
        text_length: Tokens per window of the text.
        max_texts: Windows of the text, or prompts, at most.
        least: An activation is massive above this size ...
        ratio: ... and from this many times the median of its sequence on.
        picture_layer: Layer of the 3-D picture; -1 takes the one with the largest ratio.
        picture_tokens: Tokens shown in the 3-D picture.
        prune: Heads to remove in the comparison of top, bottom and random ones.
        rank_by: Ranks them: first_token_weight or head_resid_contrib_norm.
        sweep_layers: Also switch heads and MLPs off layer by layer.
        experiment_name: First part of the run directory's name.
    """

    dataset: str = "none"
    texts: Optional[str] = None
    text_length: int = 256
    max_texts: int = 16
    least: float = 100.0
    ratio: float = 1000.0
    picture_layer: int = -1
    picture_tokens: int = 48
    prune: int = 8
    rank_by: str = "first_token_weight"
    sweep_layers: bool = True
    experiment_name: str = "massive"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, text_length=3, max_texts=1, picture_tokens=1, prune=1, picture_layer=-1)
        needs_data(self, self.texts)
        among(self, "rank_by", "first_token_weight", "head_resid_contrib_norm")
        if not (self.least >= 0 and self.ratio >= 0):
            raise InputError(
                f"least, ratio: expected 0 or more, found {self.least} and {self.ratio}"
            )
