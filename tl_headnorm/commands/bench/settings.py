"""Settings of `bench`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Optional

from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class BenchSettings:
    """Settings of the bench. Without model_path: random weights of LLaMA 3.2-1B's shape.

    Args:
        task: norms (collect), attribution (joint IG, 8 steps) or ablation (every single head).
        model_path: Hub id or directory; null makes a random model of LLaMA 3.2-1B's shape.
        layers: Number of layers of the random model; null keeps all 16.
        dtype: Data type of the weights and of the forward pass.
        device_map: auto (CUDA where there is one), cpu, cuda, cuda:1, mps.
        dataset: Registered dataset name, for prompts of your own.
        data_dir: File or directory with questions; null takes ARC-Challenge's prompt lengths.
        samples: Number of prompts.
        repeats: Timed rounds; the contenders take turns in each.
        batch_size: Prompts per forward pass.
        contenders: Which to run, for example '[hf_forward, ours_last]'; null runs all.
        seed: Seed of the random tokens.
        output_dir: Where the bench directory is made.
        debug: Show the traceback of an error.
    """

    task: Literal["norms", "attribution", "ablation"] = "norms"
    model_path: Optional[str] = None
    layers: Optional[int] = None
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    device_map: str = "auto"
    dataset: str = "arc_challenge"
    data_dir: Optional[str] = None
    samples: int = 128
    repeats: int = 3
    batch_size: int = 8
    contenders: Optional[list[str]] = None
    seed: int = 42
    output_dir: str = "outputs"
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if self.layers is not None and (self.layers < 1 or self.model_path is not None):
            raise InputError(
                f"layers: expected 1 or more and no model_path, found {self.layers}; it sets the "
                "size of the random model"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json."""
        return asdict(self)
