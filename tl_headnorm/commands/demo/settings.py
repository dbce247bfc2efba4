"""Settings of `demo`."""

from dataclasses import dataclass
from typing import Literal

from tl_headnorm.bounds import Checked, CountFrom0, OneLine


@dataclass(frozen=True)
class DemoSettings(Checked):
    """Settings of the demo.

    Args:
        token_agg: last takes the last real token, all the mean over real tokens.
        device_map: auto (CUDA where there is one), cpu, cuda, cuda:1, mps.
        validate_samples: Check this many samples against Hugging Face.
        output_dir: Where the run directory is made.
        debug: Show the traceback of an error.
    """

    token_agg: Literal["last", "all"] = "last"
    device_map: str = "auto"
    validate_samples: CountFrom0 = 64
    output_dir: OneLine = "outputs"
    debug: bool = False
