"""`validate`: the same numbers through Hugging Face's own forward."""

from dataclasses import replace
from pathlib import Path

from tl_headnorm.commands.collect.collect import collect
from tl_headnorm.commands.validate.agreement import measure, table
from tl_headnorm.commands.validate.settings import ValidateSettings
from tl_headnorm.data.prepare import prepare
from tl_headnorm.oracle.hugging_face import describe, validate
from tl_headnorm.run.files import write_json
from tl_headnorm.run.loading import open_both, run_dir, say


def run_validate(settings: ValidateSettings) -> tuple[Path | None, bool]:
    """Compare with Hugging Face, write validation.json; its directory and whether it held.

    With `table` the comparison is of every family and engine, printed and not written.
    """
    if settings.table:
        print(table(measure()))
        return None, True
    with run_dir(settings.output_dir, f"{settings.experiment_name}_validation") as path:
        model, questions = open_both(settings)
        chosen = questions[: settings.validate_samples or None]
        plain = replace(settings, validate_samples=0, per_sample=True)
        run = collect(model, chosen, plain)
        encoded = prepare(model.tokenizer, model.n_ctx, chosen, plain).encoded
        report = validate(
            model, run, encoded, plain, reference_dtype=settings.reference_dtype, progress=True
        )
        write_json(path / "config.json", settings.as_dict())
        write_json(path / "validation.json", report)
    say(describe(report))
    return path, bool(report["passed"])
