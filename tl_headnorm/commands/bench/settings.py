"""Settings of `bench`."""

from dataclasses import dataclass
from typing import Literal, Optional

from tl_headnorm.bounds import Checked, Count, CountFrom0, OneLine
from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class BenchSettings(Checked):
    """Settings of the bench. Without model_path: random weights of LLaMA 3.2-1B's shape.

    Args:
        task: norms (collect), attribution (joint IG, 8 steps) or ablation (every single head).
        model_path: Hub id or directory; null makes a random model of LLaMA 3.2-1B's shape.
        layers: Number of layers of the random model; null keeps all 16.
        dtype: Data type of the weights and of the forward pass.
        engine: hooked (HookedTransformer), bridge (TransformerBridge), auto takes what fits.
        device_map: auto (CUDA where there is one), cpu, cuda, cuda:1, mps.
        dataset: Registered dataset name, for prompts of your own.
        data_dir: File or directory with questions; null takes ARC-Challenge's prompt lengths.
        samples: Number of prompts.
        repeats: Timed rounds; the contenders take turns in each.
        batch_size: Prompts per forward pass.
        contenders: Which to run, for example hf_forward,ours_last; null runs all.
        seed: Seed of the random tokens.
        output_dir: Where the bench directory is made.
        debug: Show the traceback of an error.
    """

    task: Literal["norms", "attribution", "ablation"] = "norms"
    model_path: Optional[str] = None
    layers: Optional[Count] = None
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    engine: Literal["auto", "hooked", "bridge"] = "auto"
    device_map: str = "auto"
    dataset: str = "arc_challenge"
    data_dir: Optional[str] = None
    samples: Count = 128
    repeats: Count = 3
    batch_size: Count = 8
    contenders: Optional[list[str]] = None
    seed: CountFrom0 = 42
    output_dir: OneLine = "outputs"
    debug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.model_path is not None:
            raise InputError(
                f"layers: expected no model_path with it, found {self.model_path}; layers sets the "
                "size of the random model"
            )
