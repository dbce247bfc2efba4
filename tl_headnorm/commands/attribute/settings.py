"""Settings of `attribute`: which methods, how exactly, and what is made of their scores."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Optional

from tl_headnorm.bounds import (
    Bound,
    Count,
    CountFrom0,
    DirName,
    Fraction,
    OneOf,
    at_least,
    by_commas,
)
from tl_headnorm.errors import InputError
from tl_headnorm.settings import BATCHES, CHECKPOINTS, STUDY, Settings

METHODS = (
    "grad_x_act",
    "michel",
    "ig_joint",
    "ig_path",
    "ig_layer",
    "atp_zero",
    "atp_mean",
    "atp_corrupted",
    "shapley",
    "loo",
    "rollout",
)
SHORTHAND = {"atp": ("atp_zero", "atp_mean", "atp_corrupted"), "all": METHODS}


def expand_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """The methods named, each once; `atp` and `all` stand for several."""
    return tuple(dict.fromkeys(m for n in by_commas(names) for m in SHORTHAND.get(n, (n,))))


@dataclass(frozen=True)
class AttributeSettings(Settings):
    """Settings of an attribution run: those of a run, and how heads are given their share.

    Args:
        methods: Methods to run; atp stands for its three baselines, all for every one.
        loss: letter (among the options' letters), text (the answer's text) or lm (--texts).
        template_name: Registered template; auto takes arc_mcq_v1 or, for text, cloze.
        texts: Plain text file for the loss lm, cut into pieces of max_length tokens.
        datasets: Several dataset names or files in one run; each is a group.
        group_by: Field of the questions whose values are the groups.
        baseline: What a head's output becomes at gate 0: zero, or its mean over the samples.
        gate_start: Gate value at which integrals begin.
        steps: Quadrature points of the integrals, doubled where they are too few.
        max_steps: Most quadrature points per integral.
        tolerance: Completeness error allowed, as a share of the larger end loss.
        shapley_pairs: Permutations per sample, each taken forwards and in reverse.
        shapley_players: Whether single heads or whole layers join one by one.
        michel_normalise: Scale michel's scores to L2 norm 1 within every layer.
        stability: Also report how much the scores differ between samples.
        validate: Also prune heads in the order of every method and measure what is left.
        run: Finished run directory whose per-sample values --stability reports on.
        norms: Finished collect run whose norms are ranked beside the methods.
        pruning_points: Most points of a pruning curve.
        random_orders: Number of random orders the curves are compared with.
        greedy: Rounds of --validate's reference, sequential leave-one-out; 0 leaves it out, null
            is 8 for up to 64 heads. N rounds cost about as much as N/2 runs of loo.
        permutations: Shuffles of the group labels in the permutation test.
        fdr: False discovery rate of the heads said to differ between groups.
        batch_size: Prompts per batch; steps are stacked on top of it.
    """

    methods: Annotated[tuple[str, ...], OneOf("method", (*METHODS, *SHORTHAND))] = (
        "grad_x_act", "michel", "ig_joint", "atp_zero",
    )  # fmt: skip
    loss: Literal["letter", "text", "lm"] = "letter"
    template_name: str = "auto"
    texts: Optional[str] = None
    datasets: Optional[list[str]] = None
    group_by: Optional[str] = None
    baseline: Literal["zero", "mean"] = "zero"
    gate_start: Annotated[float, Bound(lambda gate: 0 <= gate < 1, "0 or more and less than 1")] = (
        0.0
    )
    steps: Count = 8
    max_steps: Count = 256
    tolerance: Annotated[float, Bound(lambda share: share > 0, "a share above 0")] = 0.01
    shapley_pairs: Count = 4
    shapley_players: Literal["heads", "layers"] = "heads"
    michel_normalise: bool = False
    stability: bool = False
    validate: bool = False
    run: Optional[str] = None
    norms: Optional[str] = None
    pruning_points: Annotated[int, at_least(2)] = 33
    random_orders: Count = 5
    greedy: Optional[CountFrom0] = None
    permutations: Count = 2000
    fdr: Fraction = 0.05
    batch_size: Count = 32
    experiment_name: DirName = "attribution"
    uses: ClassVar = (*STUDY, *BATCHES, *CHECKPOINTS)
    needs: ClassVar = {"greedy": "validate", "run": "stability"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < self.steps:
            raise InputError(
                f"max_steps: expected {self.steps} or more, as steps, found {self.max_steps}; set "
                f"--max_steps to {self.steps} or more"
            )
        self._check_sources()

    def _check_sources(self) -> None:
        if (self.loss == "lm") != (self.texts is not None):
            raise InputError(
                f"texts: expected a text file with --loss lm and none otherwise, found loss "
                f"{self.loss} and texts {self.texts}"
            )
        if self.loss == "lm" and (self.group_by or self.datasets):
            raise InputError("group_by: expected questions to group, found --loss lm; leave it out")
        if self.loss == "text" and self.chat:
            raise InputError("chat: expected --loss letter with it, found text; leave chat out")
        if self.loss != "letter" and self.validate:
            raise InputError(
                f"validate: expected --loss letter, whose accuracy is measured, found {self.loss}"
            )
