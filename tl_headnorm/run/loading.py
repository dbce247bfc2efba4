"""What every command begins with: quiet libraries, questions, a model."""

import logging
import sys
from typing import Any

from tl_headnorm.data.questions import Questions, load_questions
from tl_headnorm.data.templates import get_template
from tl_headnorm.model.loading import Model, load_model
from tl_headnorm.run.directory import run_dir as run_dir


def say(text: str) -> None:
    """For the person watching; stdout is kept for the path."""
    print(text, file=sys.stderr, flush=True)


def quiet() -> None:
    """Libraries keep to errors, and their bars away: the one bar shown is that of the samples."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for noisy in ("httpx", "huggingface_hub", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def open_questions(settings: Any, dataset: str | None = None, data_dir: Any = ...) -> Questions:
    """The questions the settings name, or those of another dataset on the same terms."""
    return load_questions(
        dataset or settings.dataset,
        settings.data_dir if data_dir is ... else data_dir,
        settings.split,
        max_samples=settings.max_samples,
        n_options=settings.n_options,
        on_bad_record=settings.on_bad_record,
        shard=settings.shard,
    )


def open_model(settings: Any) -> Model:
    """The model the settings name."""
    quiet()
    return load_model(
        settings.model_path,
        dtype=settings.dtype,
        engine=settings.engine,
        device_map=settings.device_map,
        self_check=settings.self_check,
        trust_remote_code=settings.trust_remote_code,
        adapter_path=settings.adapter_path,
        pickled_weights=settings.pickled_weights,
    )


def open_both(settings: Any) -> tuple[Model, Questions]:
    """Questions first: they fail fast, a model is slow to load."""
    quiet()
    if settings.template_name != "auto":
        get_template(settings.template_name, settings.template)
    questions = open_questions(settings)
    return open_model(settings), questions
