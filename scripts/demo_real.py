"""`make demo-real`: head norms and attention scores of a real model, SmolLM2-135M-Instruct.

Fetches the model once, measures every head over questions (yours with --data_dir, in ARC's
format, else the built-in ones), checks a few with Hugging Face, and reads the attention of every
head to this project's README: sinks, previous-token and induction heads.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from jsonargparse import CLI

from tl_headnorm.commands.attention.command import run_attention
from tl_headnorm.commands.attention.settings import AttentionSettings
from tl_headnorm.commands.collect.command import run_collect
from tl_headnorm.commands.demo.command import describe
from tl_headnorm.commands.fetch.command import fetch
from tl_headnorm.commands.table import COMMANDS
from tl_headnorm.run.loading import say
from tl_headnorm.run.reading import load_run
from tl_headnorm.settings import Settings

MODEL = "builtin:smollm2"
README = Path(__file__).resolve().parent.parent / "README.md"


@dataclass(frozen=True)
class DemoReal:
    """Settings of the demonstration.

    Args:
        data_dir: Questions in ARC's format; null takes the built-in ones.
        max_samples: How many of them.
        output_dir: Where the run directories are made.
    """

    data_dir: Optional[str] = None
    max_samples: int = 60
    output_dir: str = "outputs"


def main(settings: DemoReal) -> None:
    """Fetch, collect, attention; findings on stderr, the two directories on stdout."""
    started = time.time()
    fetch("smollm2")
    common: dict[str, Any] = {
        "model_path": MODEL,
        "dtype": "fp32",
        "output_dir": settings.output_dir,
    }
    run = run_collect(
        Settings(
            **common,
            dataset="arc_challenge" if settings.data_dir else "builtin:questions",
            data_dir=settings.data_dir,
            max_samples=settings.max_samples,
            validate_samples=8,
            experiment_name="demo_real",
        ),
        COMMANDS["collect"].draw,
    )
    assert run is not None  # one process alone writes it
    say(describe(load_run(run), run))
    text = README.read_text(encoding="utf-8")[:2500]
    heads = run_attention(
        AttentionSettings(**common, prompt=text, experiment_name="demo_real_attention")
    )
    say(f"\nLook at {heads / 'attention.html'}; {time.time() - started:.0f} s in all")
    print(run, heads, sep="\n")


if __name__ == "__main__":
    main(CLI(DemoReal, as_positional=False, args=sys.argv[1:]))
