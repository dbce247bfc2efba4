"""Settings of `inactive`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Optional, Union

from tl_headnorm.bounds import (
    Bound,
    Count,
    CountFrom0,
    DirName,
    Fraction,
    OneOf,
    Size,
    at_least,
    by_commas,
)
from tl_headnorm.interventions.names import CONSTANT_REPLACEMENTS
from tl_headnorm.settings import BATCHES, CHECKPOINTS, MEASURES, STUDY, Settings

MODES = ("static", "per_input", "on_the_fly")
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
_shares = Bound(
    lambda shares: shares and all(0 < share < 1 for share in shares), "parts between 0 and 1",
    "set for example --shares 0.1,0.2",
)  # fmt: skip
_ascending = Bound(
    lambda shares: list(shares) == sorted(set(shares)), "an ascending list", "sort --shares"
)


@dataclass(frozen=True)
class InactiveSettings(Settings):
    """Settings of the search for inactive heads: those of a run, and how heads are chosen.

    Args:
        measures: Scores tried, names or all; all leaves out the two that follow token_agg.
        run: Finished collect run with per-sample values, instead of measuring here.
        calibration_share: Part of the samples that ranks heads and sets thresholds.
        shares: Parts of all heads to switch off.
        modes: static (one set for all), per_input (by a clean pass), on_the_fly (as published).
        method: What z becomes: zero, mean (over calibration samples), or both by commas.
        normalise: Try every score also divided by the mean of its layer's heads on the sample.
        above: Scores by which heads above the threshold are tried as inactive too.
        combine: Also try the mean rank and a logistic model of leave-one-out effects.
        loo_samples: Calibration samples of the leave-one-out effects; 0 leaves them out.
        attributions: Finished attribute runs whose orders compete.
        random_orders: Random choices of heads, the floor.
        points: Loss of accuracy, in points, that still counts as none.
        bootstrap: Draws of samples behind every interval.
        batch_size: Prompts per batch; changed runs are stacked on top of it.
    """

    measures: Union[tuple[str, ...], str] = "all"
    run: Optional[str] = None
    calibration_share: Fraction = 0.5
    shares: Annotated[tuple[float, ...], _shares, _ascending] = SHARES
    modes: Annotated[str, OneOf("mode", MODES)] = "static,per_input,on_the_fly"
    method: Annotated[str, OneOf("method", CONSTANT_REPLACEMENTS)] = "zero,mean"
    normalise: bool = True
    above: str = "attention_first,attention_entropy"
    combine: bool = True
    loo_samples: CountFrom0 = 64
    attributions: Optional[list[str]] = None
    random_orders: Count = 10
    points: Size = 1.0
    bootstrap: Annotated[int, at_least(100)] = 1000
    batch_size: Count = 16
    experiment_name: DirName = "inactive"
    uses: ClassVar = (*STUDY, *BATCHES, *MEASURES, *CHECKPOINTS)

    @property
    def chosen_modes(self) -> tuple[str, ...]:
        """The modes asked for, each once."""
        return by_commas(self.modes)

    @property
    def methods(self) -> tuple[str, ...]:
        """The replacements asked for, each once."""
        return by_commas(self.method)

    @property
    def chosen_above(self) -> tuple[str, ...]:
        """Scores tried in both directions."""
        return by_commas(self.above)
