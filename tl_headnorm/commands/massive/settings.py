"""Settings of `massive`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Optional

from tl_headnorm.bounds import Count, DirName, Size, TextLength, at_least
from tl_headnorm.settings import BATCHES, CHECKPOINTS, STUDY, Settings, needs_data


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
    """

    dataset: str = "none"
    texts: Optional[str] = None
    text_length: TextLength = 256
    max_texts: Count = 16
    least: Size = 100.0
    ratio: Size = 1000.0
    picture_layer: Annotated[int, at_least(-1)] = -1
    picture_tokens: Count = 48
    prune: Count = 8
    rank_by: Literal["first_token_weight", "head_resid_contrib_norm"] = "first_token_weight"
    sweep_layers: bool = True
    experiment_name: DirName = "massive"
    uses: ClassVar = (*STUDY, *BATCHES, *CHECKPOINTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_data(self, self.texts)
