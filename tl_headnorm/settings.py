"""The settings of a run: one dataclass gives the flags, the YAML keys, the types and the help."""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

from tl_headnorm.errors import InputError, first_line, nearest, unknown


@dataclass(frozen=True)
class Settings:
    """Settings of a run. A YAML file given by --config holds the same keys.

    Args:
        model_path: Hub id, directory in Hugging Face format, GGUF file, or builtin:smollm2.
        adapter_path: PEFT adapter (directory or hub id) merged into the weights.
        engine: hooked (HookedTransformer), bridge (TransformerBridge), auto takes what fits.
        dtype: Data type of the weights and of the forward pass.
        device_map: auto (CUDA if there), cpu, cuda, cuda:1, mps; balanced, sequential: several.
        dataset: Registered dataset name.
        data_dir: File or directory with the questions; null looks in the cache or on the hub.
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
        measures: What is taken of every head: names, or all; the two norms follow token_agg.
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
        resume: Run directory left unfinished; its own settings are taken, and it goes on.
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
    max_samples: int = -1
    shard: Optional[str] = None
    n_options: tuple[int, ...] = (4, 5)
    template_name: str = "arc_mcq_v1"
    template: Optional[str] = None
    chat: bool = False
    few_shot: int = 0
    token_agg: Literal["last", "all"] = "last"
    exclude_first_token: bool = False
    measures: Union[tuple[str, ...], str] = ("head_output_norm", "head_resid_contrib_norm")
    measures_file: Optional[str] = None
    padding_side: Literal["right", "left"] = "right"
    prepend_bos: bool = True
    batch_size: int = 8
    max_batch_tokens: Union[Literal["auto"], int] = "auto"
    max_length: int = 384
    per_sample: bool = True
    score_answers: bool = True
    validate_samples: int = 0
    self_check: bool = True
    on_bad_record: Literal["error", "skip"] = "error"
    checkpoint_every: float = 60.0
    resume: Optional[str] = None
    seed: int = 42
    output_dir: str = "outputs"
    experiment_name: str = "arc_head_activation"
    trust_remote_code: bool = False
    pickled_weights: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1), ("max_length", 1), ("few_shot", 0), ("validate_samples", 0),
            ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InputError(
                    f"{name}: expected {least} or more, found {getattr(self, name)}; "
                    f"set --{name} to {least} or more"
                )
        if not self.checkpoint_every >= 0:
            raise InputError(
                f"checkpoint_every: expected 0 or more seconds, found {self.checkpoint_every}; 0 "
                "saves after every batch"
            )
        if self.max_samples == 0 or self.max_samples < -1:
            raise InputError(
                f"max_samples: expected -1 (all) or a number above 0, found {self.max_samples}; "
                "set --max_samples to the number of questions wanted"
            )
        parse_shard(self.shard)
        if self.max_batch_tokens != "auto" and int(self.max_batch_tokens) < 1:
            raise InputError(
                f"max_batch_tokens: expected auto or a number above 0, found "
                f"{self.max_batch_tokens}"
            )
        if self.exclude_first_token and self.token_agg != "all":
            raise InputError(
                "exclude_first_token: expected token_agg all, found token_agg last, where it "
                "would change nothing; add --token_agg all or leave it out"
            )
        if not self.experiment_name or "/" in self.experiment_name:
            raise InputError(
                f"experiment_name: expected a name without '/', found {self.experiment_name!r}; "
                "use --output_dir to choose the folder"
            )
        if not self.n_options or not all(2 <= n <= 26 for n in self.n_options):
            raise InputError(
                f"n_options: expected numbers from 2 to 26, found {list(self.n_options)}; "
                "set for example --n_options '[3,4,5]'"
            )

    def updated(self, **overrides: Any) -> "Settings":
        """A copy with some settings changed; an unknown name is refused with the nearest one."""
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                raise InputError(f"unknown setting {name!r}{nearest(name, known)}")
        return replace(self, **overrides)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


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


def check_config(path: str | Path, known: Collection[str]) -> None:
    """Raise InputError unless a YAML file is a mapping with each key known and given once.

    YAML itself lets a repeated key silently win, so a run would not be the one that was read.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            yaml.safe_load(text)  # says where a tag is that stands for no plain value
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"config: expected a YAML file with settings, found {path} ({first_line(error)}); "
            "check the path"
        ) from None
    except RecursionError:
        raise InputError(
            f"{path}: expected YAML, found a fault (nested too deeply); mend it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", first_line(error))
        raise InputError(f"{where}: expected YAML, found a fault ({problem}); mend it") from None
    if not isinstance(root, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "plain text"}
        found = kinds.get(type(root), "an empty file")
        raise InputError(f"{path}: expected settings as lines 'key: value', found {found}")
    first: dict[str, int] = {}
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in first:
            raise InputError(
                f"{path}, line {line}: expected each setting once, found {key!r} again (first on "
                f"line {first[key]}); keep one"
            )
        if key not in known:
            raise InputError(f"{path}, line {line}: unknown setting {key!r}{nearest(key, known)}")
        first[key] = line


def at_least(settings: Settings, **least: int) -> None:
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise InputError(f"{name}: expected {bound} or more, found {getattr(settings, name)}")


def among(settings: Settings, name: str, *choices: str) -> None:
    if getattr(settings, name) not in choices:
        raise unknown(name, getattr(settings, name), choices)


def needs_data(settings: Settings, texts: str | None) -> None:
    if settings.dataset == "none" and texts is None:
        raise InputError(
            "dataset: expected questions or texts to run on, found neither; give --dataset and "
            "--data_dir, or --texts FILE"
        )
