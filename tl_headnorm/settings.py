"""The settings of a run: one dataclass gives the flags, the YAML keys, the types and the help."""

import re
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Optional, TypeVar, Union

from tl_headnorm.bounds import Bound, Checked, Count, CountFrom0, DirName, OneLine, Size
from tl_headnorm.errors import InputError, nearest

AnySettings = TypeVar("AnySettings", bound="Settings")

# Groups of settings that commands share: each settings class lists in `uses` those it has.
STUDY = (
    "model_path", "adapter_path", "engine", "dtype", "device_map", "self_check",
    "trust_remote_code", "pickled_weights", "dataset", "data_dir", "split", "max_samples",
    "n_options", "on_bad_record", "template_name", "template", "chat", "few_shot", "prepend_bos",
    "max_length", "seed", "output_dir", "experiment_name", "debug",
)  # fmt: skip
BATCHES = ("padding_side", "batch_size", "max_batch_tokens")
TOKENS = ("token_agg", "exclude_first_token")
MEASURES = ("measures", "measures_file")
SAMPLES = ("shard", "per_sample", "score_answers", "validate_samples")
CHECKPOINTS = ("checkpoint_every", "resume")


@dataclass(frozen=True)
class Settings(Checked):
    """Settings of a run. A YAML file given by --config holds the same keys.

    Args:
        model_path: Hub id, directory in Hugging Face format, GGUF file, or builtin:smollm2.
        adapter_path: PEFT adapter (directory or hub id) merged into the weights.
        engine: hooked (HookedTransformer), bridge (TransformerBridge), auto takes what fits.
        dtype: Data type of the weights and of the forward pass.
        device_map: auto (CUDA if there), cpu, cuda, cuda:1, mps; balanced, sequential: several.
        dataset: Registered dataset name.
        data_dir: File or directory with the questions; null is the cache or the hub.
        split: Part of the dataset: test, validation (dev) or train.
        max_samples: The first N usable questions in file order; -1 takes all.
        shard: Part K/N of those questions, such as 3/16 for job 3 of 16; see merge.
        n_options: Numbers of options a question may have; others are skipped and counted.
        template_name: Registered prompt template.
        template: Jinja2 template, inline or a file; overrides template_name.
        chat: Put the prompt into the tokenizer's chat template, up to where the answer starts.
        few_shot: Solved examples put before every question, from the train or dev split.
        token_agg: last takes the last real token, all the mean over real tokens.
        exclude_first_token: Leave the first token (attention sink) out of the mean (all only).
        measures: Measures of every head: names, or all; the two norms follow token_agg.
        measures_file: Python file with a dict MEASURES of your own; its names may be asked for.
        padding_side: Side on which shorter prompts are padded.
        prepend_bos: Begin every prompt with exactly one BOS, if the tokenizer has one.
        batch_size: Prompts per forward pass at most.
        max_batch_tokens: Padded tokens per forward pass at most; auto goes by free memory.
        max_length: Longest prompt in tokens; longer ones lose their beginning after BOS.
        per_sample: Write per_sample.npz and keep every sample's values.
        score_answers: Predict the answer letter and report accuracy.
        validate_samples: Check this many samples against Hugging Face and stamp meta.json.
        self_check: Let the model prove itself on a probe when it is loaded.
        on_bad_record: error stops at a malformed record, skip counts it.
        checkpoint_every: Seconds between saved states of the run; 0 saves after every batch.
        resume: Unfinished run directory, continued with its own settings.
        seed: Seed of everything random (few-shot choice).
        output_dir: Where run directories are made.
        experiment_name: First part of the run directory's name.
        trust_remote_code: Allow code from the model's repository to run.
        pickled_weights: Allow weights stored as pickle (pytorch_model.bin), which can hold code.
        debug: Show the traceback of an error.
    """

    model_path: str = "meta-llama/Llama-3.2-1B"
    adapter_path: Optional[str] = None
    engine: Literal["auto", "hooked", "bridge"] = "auto"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    device_map: str = "auto"
    dataset: str = "arc_challenge"
    data_dir: Optional[str] = None
    split: str = "test"
    max_samples: Annotated[
        int,
        Bound(lambda n: n == -1 or n > 0, "-1 (all) or a number above 0",
              "set --max_samples to the number of questions wanted"),
    ] = -1  # fmt: skip
    shard: Optional[str] = None
    n_options: Annotated[
        tuple[int, ...],
        Bound(lambda ns: ns and all(2 <= n <= 26 for n in ns), "numbers from 2 to 26",
              "set for example --n_options 3,4,5"),
    ] = (4, 5)  # fmt: skip
    template_name: str = "arc_mcq_v1"
    template: Optional[str] = None
    chat: bool = False
    few_shot: CountFrom0 = 0
    token_agg: Literal["last", "all"] = "last"
    exclude_first_token: bool = False
    measures: Union[tuple[str, ...], str] = ("head_output_norm", "head_resid_contrib_norm")
    measures_file: Optional[str] = None
    padding_side: Literal["right", "left"] = "right"
    prepend_bos: bool = True
    batch_size: Count = 8
    max_batch_tokens: Annotated[
        Union[Literal["auto"], int],
        Bound(lambda n: n == "auto" or n > 0, "auto or a number above 0"),
    ] = "auto"
    max_length: Count = 384
    per_sample: bool = True
    score_answers: bool = True
    validate_samples: CountFrom0 = 0
    self_check: bool = True
    on_bad_record: Literal["error", "skip"] = "error"
    checkpoint_every: Size = 60.0
    resume: Optional[str] = None
    seed: CountFrom0 = 42
    output_dir: OneLine = "outputs"
    experiment_name: DirName = "arc_head_activation"
    trust_remote_code: bool = False
    pickled_weights: bool = False
    debug: bool = False

    uses: ClassVar[tuple[str, ...]] = (
        *STUDY, *BATCHES, *TOKENS, *MEASURES, *SAMPLES, *CHECKPOINTS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_shard(self.shard)
        if self.exclude_first_token and self.token_agg != "all":
            raise InputError(
                "exclude_first_token: expected token_agg all, found token_agg last, where it "
                "would change nothing; add --token_agg all or leave it out"
            )

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The settings of the command: its own, and the shared ones it uses."""
        shared = {field.name for field in fields(Settings)} - set(cls.uses)
        return tuple(field.name for field in fields(cls) if field.name not in shared)

    def updated(self: AnySettings, **overrides: Any) -> AnySettings:
        """A copy with some settings changed; an unknown name is refused with the nearest one."""
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                raise InputError(f"unknown setting {name!r}{nearest(name, known)}")
        return replace(self, **overrides)


def parse_shard(shard: str | None) -> tuple[int, int] | None:
    """(K, N) of "K/N", K counted from 1; None where there is no such part."""
    if shard is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(
            f"shard: expected K/N, K from 1 to N, such as 3/16, found {shard!r}; set for example "
            "--shard 3/16"
        )
    return int(match[1]), int(match[2])


def needs_data(settings: Settings, texts: str | None) -> None:
    if settings.dataset == "none" and texts is None:
        raise InputError(
            "dataset: expected questions or texts to run on, found neither; give --dataset and "
            "--data_dir, or --texts FILE"
        )
