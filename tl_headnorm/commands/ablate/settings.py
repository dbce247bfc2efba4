"""Settings of `ablate`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Optional

from tl_headnorm.bounds import Count, CountFrom0, DirName, OneOf, TextLength, by_commas
from tl_headnorm.errors import InputError
from tl_headnorm.interventions.names import REPLACEMENTS
from tl_headnorm.settings import BATCHES, CHECKPOINTS, STUDY, TOKENS, Settings, needs_data


@dataclass(frozen=True)
class AblateSettings(Settings):
    """Settings of an ablation: those of a run, what is removed, and how.

    Args:
        dataset: Registered dataset name, or none to use texts alone.
        heads: L.H lists and ranges, a file, all, top:K, bottom:K, none, or sweep (each alone);
            null is sweep, or none where mlps is given.
        mlps: Layers whose MLP is switched off, such as 0,3-5; all, none, or sweep (each alone).
        layers: Layers that heads all, mlps all and the sweeps speak of.
        method: What z becomes, one or several by commas; all takes every method.
        experiment: components runs all heads, all MLPs and each layer's, side by side.
        run: Run directory whose heads.parquet top:K and bottom:K rank by.
        statistic: Column of that heads.parquet.
        input_threshold: Also remove the heads under this value on each input, and on average.
        threshold_measure: The norm it is of: head_output_norm or head_resid_contrib_norm.
        threshold_relative: Divide the norm by the mean of its layer's heads on that input.
        texts: Text file, or .jsonl of texts, for the loss of the next token and perplexity.
        text_length: Tokens per window of the text.
        max_texts: Windows of the text at most.
        reference_samples: Samples kept apart, whose z mean, resample and gaussian put in.
        profile: Also take the massive-activation profile of every set.
        time_sharing: Time the sweep on this many questions against one forward each per head.
    """

    heads: Optional[str] = None
    mlps: str = "none"
    layers: str = "all"
    method: Annotated[str, OneOf("method", (*REPLACEMENTS, "all"))] = "zero"
    experiment: Optional[Literal["components"]] = None
    run: Optional[str] = None
    statistic: str = "head_resid_contrib_norm_mean"
    input_threshold: Optional[float] = None
    threshold_measure: Literal["head_output_norm", "head_resid_contrib_norm"] = "head_output_norm"
    threshold_relative: bool = True
    texts: Optional[str] = None
    text_length: TextLength = 256
    max_texts: Count = 32
    reference_samples: CountFrom0 = 64
    profile: bool = False
    time_sharing: CountFrom0 = 0
    experiment_name: DirName = "ablation"
    uses: ClassVar = (*STUDY, *BATCHES, *TOKENS, *CHECKPOINTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_data(self, self.texts)
        if self.time_sharing and self.dataset == "none":
            raise InputError(
                "time_sharing: expected questions to time the sweep on, found dataset none; give "
                "--dataset and --data_dir, or leave it out"
            )

    @property
    def chosen_heads(self) -> str:
        """`heads`, or what null stands for: `--mlps all` is all MLPs off and nothing more."""
        if self.heads is not None:
            return self.heads
        return "sweep" if self.mlps == "none" else "none"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods asked for, each once."""
        return REPLACEMENTS if self.method == "all" else by_commas(self.method)
