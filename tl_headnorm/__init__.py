"""Per-head norms of decoder-only language models, with TransformerLens.

Names are loaded on first use, so that importing the package loads neither torch nor
transformer_lens.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tl_headnorm.commands.collect.collect import collect
    from tl_headnorm.commands.compare.compare import compare
    from tl_headnorm.data.questions import Question, load_questions, register_dataset
    from tl_headnorm.data.templates import register_template
    from tl_headnorm.data.tokens import build_sft_example
    from tl_headnorm.errors import InputError
    from tl_headnorm.model.loading import load_model
    from tl_headnorm.plots.heatmaps import heatmap
    from tl_headnorm.run.reading import load_run
    from tl_headnorm.settings import Settings

_HOME = {
    "InputError": "errors",
    "Question": "data.questions",
    "Settings": "settings",
    "build_sft_example": "data.tokens",
    "collect": "commands.collect.collect",
    "compare": "commands.compare.compare",
    "heatmap": "plots.heatmaps",
    "load_model": "model.loading",
    "load_questions": "data.questions",
    "load_run": "run.reading",
    "register_dataset": "data.questions",
    "register_template": "data.templates",
}

__all__ = [
    "InputError",
    "Question",
    "Settings",
    "build_sft_example",
    "collect",
    "compare",
    "heatmap",
    "load_model",
    "load_questions",
    "load_run",
    "register_dataset",
    "register_template",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("tl-headnorm")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if "IPython" in sys.modules:  # a notebook shows runs as small maps
        import_module(f"{__name__}.plots.notebook").show_runs()
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
