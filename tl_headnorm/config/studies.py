"""The settings of `ablate` and `massive`."""

from dataclasses import dataclass
from typing import Literal, Optional

from tl_headnorm.config.run import Settings
from tl_headnorm.errors import InputError, unknown

# Named here too, because a settings' class must not load torch; a test keeps the two equal.
ABLATION_METHODS = ("zero", "mean", "mean_position", "resample", "gaussian")


def _at_least(settings: Settings, **least: int) -> None:
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise InputError(f"{name}: expected {bound} or more, found {getattr(settings, name)}")


def _among(settings: Settings, name: str, *choices: str) -> None:
    if getattr(settings, name) not in choices:
        raise unknown(name, getattr(settings, name), choices)


def _needs_data(settings: Settings, texts: str | None) -> None:
    if settings.dataset == "none" and texts is None:
        raise InputError(
            "dataset: expected questions or texts to run on, found neither; give --dataset and "
            "--data_dir, or --texts FILE"
        )


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
        experiment_name: First part of the run directory's name.
    """

    heads: Optional[str] = None
    mlps: str = "none"
    layers: str = "all"
    method: str = "zero"
    experiment: Optional[Literal["components"]] = None
    run: Optional[str] = None
    statistic: str = "head_resid_contrib_norm_mean"
    input_threshold: Optional[float] = None
    threshold_measure: str = "head_output_norm"
    threshold_relative: bool = True
    texts: Optional[str] = None
    text_length: int = 256
    max_texts: int = 32
    reference_samples: int = 64
    profile: bool = False
    time_sharing: int = 0
    experiment_name: str = "ablation"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, text_length=3, max_texts=1, reference_samples=0, time_sharing=0)
        _needs_data(self, self.texts)
        _among(self, "threshold_measure", "head_output_norm", "head_resid_contrib_norm")
        if self.time_sharing and self.dataset == "none":
            raise InputError(
                "time_sharing: expected questions to time the sweep on, found dataset none; give "
                "--dataset and --data_dir, or leave it out"
            )
        for name in self.methods:
            if name not in ABLATION_METHODS:
                raise unknown("method", name, [*ABLATION_METHODS, "all"])

    @property
    def chosen_heads(self) -> str:
        """`heads`, or what null stands for: `--mlps all` is all MLPs off and nothing more."""
        if self.heads is not None:
            return self.heads
        return "sweep" if self.mlps == "none" else "none"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods asked for, each once."""
        if self.method == "all":
            return ABLATION_METHODS
        return tuple(dict.fromkeys(part.strip() for part in self.method.split(",")))


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
        _at_least(self, text_length=3, max_texts=1, picture_tokens=1, prune=1, picture_layer=-1)
        _needs_data(self, self.texts)
        _among(self, "rank_by", "first_token_weight", "head_resid_contrib_norm")
        if not (self.least >= 0 and self.ratio >= 0):
            raise InputError(
                f"least, ratio: expected 0 or more, found {self.least} and {self.ratio}"
            )
