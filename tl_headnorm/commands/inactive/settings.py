"""The settings of `inactive`."""

from dataclasses import dataclass
from typing import Optional, Union

from tl_headnorm.errors import InputError, unknown
from tl_headnorm.settings import Settings

MODES = ("static", "per_input", "on_the_fly")
METHODS = ("zero", "mean")
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


def _listed(text: str) -> tuple[str, ...]:
    """The parts of a list by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


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
        experiment_name: First part of the run directory's name.
    """

    measures: Union[tuple[str, ...], str] = "all"
    run: Optional[str] = None
    calibration_share: float = 0.5
    shares: tuple[float, ...] = SHARES
    modes: str = "static,per_input,on_the_fly"
    method: str = "zero,mean"
    normalise: bool = True
    above: str = "attention_first,attention_entropy"
    combine: bool = True
    loo_samples: int = 64
    attributions: Optional[list[str]] = None
    random_orders: int = 10
    points: float = 1.0
    bootstrap: int = 1000
    batch_size: int = 16
    experiment_name: str = "inactive"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("random_orders", 1), ("bootstrap", 100), ("loo_samples", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name}: expected {least} or more, found {getattr(self, name)}; set "
                    f"--{name} to {least} or more"
                )
        if not 0 < self.calibration_share < 1:
            raise InputError(
                f"calibration_share: expected a part between 0 and 1, found "
                f"{self.calibration_share}"
            )
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise InputError(
                f"shares: expected parts between 0 and 1, found {list(self.shares)}; set for "
                "example --shares '[0.1,0.2]'"
            )
        if list(self.shares) != sorted(set(self.shares)):
            raise InputError(f"shares: expected an ascending list, found {list(self.shares)}")
        if self.points < 0:
            raise InputError(f"points: expected 0 or more, found {self.points}")
        for name, chosen, known in (
            ("mode", self.chosen_modes, MODES),
            ("method", self.methods, METHODS),
        ):
            for one in chosen:
                if one not in known:
                    raise unknown(name, one, known)
            if not chosen:
                raise InputError(f"{name}: expected one of {', '.join(known)}, found none")

    @property
    def chosen_modes(self) -> tuple[str, ...]:
        """The modes asked for, each once."""
        return _listed(self.modes)

    @property
    def methods(self) -> tuple[str, ...]:
        """The replacements asked for, each once."""
        return _listed(self.method)

    @property
    def chosen_above(self) -> tuple[str, ...]:
        """Scores tried in both directions."""
        return _listed(self.above)
