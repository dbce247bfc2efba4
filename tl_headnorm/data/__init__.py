"""Questions, prompts and batches: everything before the model."""

from tl_headnorm.data.batches import Batch, batches_in_order, make_batch
from tl_headnorm.data.questions import (
    DATASETS,
    Question,
    Questions,
    load_questions,
    register_dataset,
)
from tl_headnorm.data.templates import (
    TEMPLATES,
    Sample,
    build_samples,
    get_template,
    register_template,
)
from tl_headnorm.data.tokens import Encoded, build_sft_example, encode

__all__ = [
    "DATASETS",
    "TEMPLATES",
    "Batch",
    "Encoded",
    "Question",
    "Questions",
    "Sample",
    "batches_in_order",
    "build_samples",
    "build_sft_example",
    "encode",
    "get_template",
    "load_questions",
    "make_batch",
    "register_dataset",
    "register_template",
]
