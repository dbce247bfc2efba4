"""The commands, one line each: folder `commands/<name>/` holds its settings and its function."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tl_headnorm.bounds import Checked
from tl_headnorm.errors import InputError
from tl_headnorm.run.ranks import world_size

DONE, CHECK_FAILED = 0, 1


@dataclass(frozen=True)
class Command:
    """A subcommand: in `commands.<name>`, `settings:<Name>Settings` and `command:run_<name>`.

    The function takes the settings and, with `then`, a function of a run, its directory and its
    questions that calls those; it returns the directory it wrote or, where it is a check, the
    directory and whether the check held. It is imported when it runs, so that --help is quick.
    """

    name: str
    help: str
    positional: str | None = None  # a setting, a list of text, given without --name
    metavar: str = "DIR"  # what the positional setting lists
    shared: bool = False  # whether the processes of a launcher may share the work
    then: tuple[str, ...] = ()  # add figures and pages to a new run, before its meta.json

    @property
    def settings(self) -> type[Checked]:
        """The class of its settings; loads no torch."""
        module = import_module(f"tl_headnorm.commands.{self.name}.settings")
        return getattr(module, f"{self.name.capitalize()}Settings")

    def run(self, settings: Checked, together: Callable[..., Any] = lambda work: work()) -> int:
        """Do the work and print the directory it wrote; the exit code.

        Of several processes, those that write nothing return None for it.
        """
        if not self.shared:
            together(_one_process)
        work = _load(f"{self.name}.command:run_{self.name}")
        found = work(settings, self.draw) if self.then else work(settings)
        path, held = found if isinstance(found, tuple) else (found, True)
        if path is not None:
            print(path)
        return DONE if held else CHECK_FAILED

    def draw(self, *run: Any) -> None:
        """Add figures and pages to a new run: its Dataset, directory and questions."""
        for name in self.then:
            _load(name)(*run)


def _load(name: str) -> Callable[..., Any]:
    """The function that `folder.module:function` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(f"tl_headnorm.commands.{module}"), function)
    return found


def _one_process() -> None:
    if world_size() > 1:
        raise InputError(
            f"expected one process for this command, found {world_size()} of a launcher; only "
            "collect shares its work between them"
        )


# The figures and the page of a new run; they come before its meta.json.
PAGES = ("collect.plots:save_heatmaps", "report.command:report_of_new_run")

COMMANDS = {
    command.name: command
    for command in (
        Command("demo", "The main job on the built-in model: needs no weights, data or network.",
                then=PAGES),
        Command("fetch", "Get a real model for --model_path builtin:NAME into the user's cache.",
                positional="models", metavar="NAME"),
        Command("collect", "Measure every head over a dataset and write a run directory.",
                shared=True, then=PAGES),
        Command("validate", "Compare the same numbers with Hugging Face's own forward."),
        Command("evaluate", "Accuracy by answer letter, or by the likelihood of option texts."),
        Command("merge", "Merge run directories of collect that measured different samples.",
                positional="runs", then=PAGES),
        Command("compare", "Set two runs side by side: what changed in every head, and answers.",
                positional="runs"),
        Command("ablate", "Remove heads or MLPs and measure answers, loss and perplexity."),
        Command("massive", "Find massive activations, who makes them, and what they are for."),
        Command("attribute", "Score every head's share in the answers, and check by pruning."),
        Command("attention", "Show attention: patterns, keywords, generation, distraction."),
        Command("steer", "Boost or suppress attention to chosen tokens, and measure answers."),
        Command("inactive", "Score heads in every way, switch the lowest off, measure the loss."),
        Command("report", "Write a run's report.html again, with the studies of that run.",
                positional="runs"),
        Command("bench", "Time the same prompts through Hugging Face, TransformerLens and this."),
    )
}  # fmt: skip
