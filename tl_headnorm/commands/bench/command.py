"""`bench`: the same prompts through Hugging Face, TransformerLens and this package."""

from pathlib import Path

from tl_headnorm.commands.bench import plots, side_by_side
from tl_headnorm.commands.bench.settings import BenchSettings
from tl_headnorm.plots.save import save_png
from tl_headnorm.run.files import write_json
from tl_headnorm.run.loading import run_dir, say


def run_bench(settings: BenchSettings) -> Path:
    """Run the bench, write bench.json and the bar chart; its directory."""
    with run_dir(settings.output_dir, "bench") as path:
        write_json(path / "config.json", settings.as_dict())
        report = side_by_side.run_bench(settings)
        write_json(path / "bench.json", report)
        save_png(plots.bars(report), path / "bench.png")
    say(side_by_side.table(report))
    return path
