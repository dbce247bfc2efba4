"""The commands: each one's help line, settings, and the job that does it."""

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from tl_headnorm.config.attribute import AttributeSettings
from tl_headnorm.config.run import BenchSettings, DemoSettings, EvaluateSettings, Settings
from tl_headnorm.config.studies import AblateSettings, MassiveSettings

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

    @property
    def names(self) -> list[str]:
        """Its settings' names."""
        return [f.name for f in fields(self.settings) if f.name not in self.skip]

    def run(self, settings: Any) -> int:
        """Do the job and print the directory it wrote; the exit code."""
        module, _, function = self.job.partition(":")
        found = getattr(import_module(f"tl_headnorm.{module}"), function)(settings)
        path, held = found if isinstance(found, tuple) else (found, True)
        print(path)
        return DONE if held else CHECK_FAILED


# Settings of a run that do nothing in a study of many runs.
_NOT_IN_STUDIES = ("per_sample", "score_answers", "validate_samples")
_AGGREGATION = ("token_agg", "exclude_first_token")

COMMANDS: dict[str, Command] = {
    "demo": Command(
        "The main job on the built-in model: needs no weights, no data, no network.",
        DemoSettings,
        "demo:run_demo",
    ),
    "collect": Command(
        "Measure every head over a dataset and write a run directory.",
        Settings,
        "jobs.run:run_collect",
    ),
    "validate": Command(
        "Compare the same numbers with Hugging Face's own forward.",
        Settings,
        "jobs.run:run_validate",
    ),
    "evaluate": Command(
        "Accuracy by answer letter, or by the likelihood of each option's text.",
        EvaluateSettings,
        "jobs.run:run_evaluate",
        skip=(*_AGGREGATION, *_NOT_IN_STUDIES),
    ),
    "ablate": Command(
        "Remove heads or MLPs and measure answers, loss and perplexity.",
        AblateSettings,
        "jobs.studies:run_ablate",
        skip=_NOT_IN_STUDIES,
    ),
    "massive": Command(
        "Find massive activations, who makes them, and what they are for.",
        MassiveSettings,
        "jobs.massive:run_massive",
        skip=(*_NOT_IN_STUDIES, *_AGGREGATION),
    ),
    "attribute": Command(
        "Score every head's share in the answers, and check the scores by pruning.",
        AttributeSettings,
        "jobs.attribute:run_attribute",
        skip=(*_NOT_IN_STUDIES, *_AGGREGATION),
    ),
    "bench": Command(
        "Time the same prompts through Hugging Face, TransformerLens and this package.",
        BenchSettings,
        "jobs.run:run_bench",
    ),
}
