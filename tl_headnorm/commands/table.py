"""The commands: each one's help line, settings, and the job that does it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from tl_headnorm.commands.ablate.settings import AblateSettings
from tl_headnorm.commands.attention.settings import AttentionSettings
from tl_headnorm.commands.attribute.settings import AttributeSettings
from tl_headnorm.commands.bench.settings import BenchSettings
from tl_headnorm.commands.compare.settings import CompareSettings
from tl_headnorm.commands.demo.settings import DemoSettings
from tl_headnorm.commands.evaluate.settings import EvaluateSettings
from tl_headnorm.commands.fetch.settings import FetchSettings
from tl_headnorm.commands.inactive.settings import InactiveSettings
from tl_headnorm.commands.massive.settings import MassiveSettings
from tl_headnorm.commands.merge.settings import MergeSettings
from tl_headnorm.commands.report.settings import ReportSettings
from tl_headnorm.commands.steer.settings import SteerSettings
from tl_headnorm.errors import InputError
from tl_headnorm.run.launch import processes
from tl_headnorm.settings import Settings

DONE, CHECK_FAILED = 0, 1


@dataclass(frozen=True)
class Command:
    """A subcommand: its help line, its settings' class, and where the job is (module:function).

    The job takes the settings and returns the directory it wrote or, where it is a check, the
    directory and whether the check held. It is imported when it runs, so that --help is quick.
    """

    help: str
    settings: type
    job: str
    skip: tuple[str, ...] = ()  # inherited settings that would do nothing here
    positional: str | None = None  # a setting, a list of text, given without --name
    metavar: str = "DIR"  # what the positional setting lists
    shared: bool = False  # whether the processes of a launcher may share the work

    @property
    def names(self) -> list[str]:
        """Its settings' names."""
        return [f.name for f in fields(self.settings) if f.name not in self.skip]

    def run(self, settings: Any, together: Callable[..., Any] = lambda work: work()) -> int:
        """Do the job and print the directory it wrote; the exit code.

        Of several processes, those that write nothing return None for it.
        """
        if not self.shared:
            together(_one_process)
        module, _, function = self.job.partition(":")
        found = getattr(import_module(f"tl_headnorm.{module}"), function)(settings)
        path, held = found if isinstance(found, tuple) else (found, True)
        if path is not None:
            print(path)
        return DONE if held else CHECK_FAILED


def _one_process() -> None:
    if processes() > 1:
        raise InputError(
            f"expected one process for this command, found {processes()} of a launcher; only "
            "collect shares its work between them"
        )


# Settings of a run that is kept as it goes.
_KEEPING = ("checkpoint_every", "resume")
# Settings of a run that do nothing in a study of many runs.
_MEASURES = ("measures", "measures_file")
_NOT_IN_STUDIES = (
    "shard", "per_sample", "score_answers", "validate_samples", *_MEASURES, *_KEEPING,
)  # fmt: skip
_AGGREGATION = ("token_agg", "exclude_first_token")
_BATCHES = ("padding_side", "batch_size", "max_batch_tokens")

COMMANDS: dict[str, Command] = {
    "demo": Command(
        "The main job on the built-in model: needs no weights, no data, no network.",
        DemoSettings,
        "commands.demo.command:run_demo",
    ),
    "fetch": Command(
        "Get a real model for --model_path builtin:NAME into the user's cache, once.",
        FetchSettings,
        "commands.fetch.command:run_fetch",
        positional="models",
        metavar="NAME",
    ),
    "collect": Command(
        "Measure every head over a dataset and write a run directory.",
        Settings,
        "commands.collect.command:run_collect",
        shared=True,
    ),
    "validate": Command(
        "Compare the same numbers with Hugging Face's own forward.",
        Settings,
        "commands.validate.command:run_validate",
        skip=(*_MEASURES, *_KEEPING),
    ),
    "evaluate": Command(
        "Accuracy by answer letter, or by the likelihood of each option's text.",
        EvaluateSettings,
        "commands.evaluate.command:run_evaluate",
        skip=(*_AGGREGATION, *_NOT_IN_STUDIES),
    ),
    "merge": Command(
        "Merge run directories of collect that measured different samples.",
        MergeSettings,
        "commands.merge.command:run_merge",
        positional="runs",
    ),
    "compare": Command(
        "Set two runs side by side: what changed in every head, and the answers.",
        CompareSettings,
        "commands.compare.command:run_compare",
        positional="runs",
    ),
    "ablate": Command(
        "Remove heads or MLPs and measure answers, loss and perplexity.",
        AblateSettings,
        "commands.ablate.command:run_ablate",
        skip=_NOT_IN_STUDIES,
    ),
    "massive": Command(
        "Find massive activations, who makes them, and what they are for.",
        MassiveSettings,
        "commands.massive.command:run_massive",
        skip=(*_NOT_IN_STUDIES, *_AGGREGATION),
    ),
    "attribute": Command(
        "Score every head's share in the answers, and check the scores by pruning.",
        AttributeSettings,
        "commands.attribute.command:run_attribute",
        skip=(*_NOT_IN_STUDIES, *_AGGREGATION),
    ),
    "attention": Command(
        "Show where heads look: patterns, keywords, while writing, under distraction.",
        AttentionSettings,
        "commands.attention.command:run_attention",
        skip=(*_NOT_IN_STUDIES, *_AGGREGATION, *_BATCHES),
    ),
    "steer": Command(
        "Boost or suppress attention to chosen tokens, and see what becomes of the answers.",
        SteerSettings,
        "commands.steer.command:run_steer",
        skip=(*_NOT_IN_STUDIES, *_AGGREGATION),
    ),
    "inactive": Command(
        "Score heads in every way, switch the lowest off, and see what the model can do without.",
        InactiveSettings,
        "commands.inactive.command:run_inactive",
        skip=(*(name for name in _NOT_IN_STUDIES if name not in _MEASURES), *_AGGREGATION),
    ),
    "report": Command(
        "Write a run's report.html again, with the studies that lie beside it now.",
        ReportSettings,
        "commands.report.command:run_report",
        positional="runs",
    ),
    "bench": Command(
        "Time the same prompts through Hugging Face, TransformerLens and this package.",
        BenchSettings,
        "commands.bench.command:run_bench",
    ),
}
