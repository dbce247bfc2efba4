"""`evaluate`: answers scored by letter or by option text."""

from pathlib import Path

from tl_headnorm.commands.evaluate.evaluate import evaluate
from tl_headnorm.commands.evaluate.settings import EvaluateSettings
from tl_headnorm.run.files import write_json, write_with
from tl_headnorm.run.loading import open_both, run_dir, say


def run_evaluate(settings: EvaluateSettings) -> Path:
    """Score the answers, write evaluation.json and samples.parquet; the directory."""
    with run_dir(settings.output_dir, f"{settings.experiment_name}_evaluation") as path:
        model, questions = open_both(settings)
        result = evaluate(model, questions, settings)
        write_json(path / "config.json", settings.as_dict())
        table = result.to_dataframe().reset_index(drop=True)
        write_with(path / "samples.parquet", lambda f: table.to_parquet(f, index=False))
        write_json(path / "evaluation.json", result.attrs)
    found = ", ".join(
        f"{key} {result.attrs[key]:.3f}" for key in ("acc", "acc_norm") if key in result.attrs
    )
    say(f"{settings.scoring} scoring, {result.attrs['num_processed']:,} questions: {found}")
    return path
