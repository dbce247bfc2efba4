"""Settings of `steer`: the tokens attention is steered to, the heads, and the evaluation."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Optional, Union

from tl_headnorm.bounds import Bound, Count, CountFrom0, DirName, Size, TextLength
from tl_headnorm.errors import InputError
from tl_headnorm.settings import BATCHES, CHECKPOINTS, STUDY, Settings

_spans = "question, option:answer, option:wrong or option:A (B, C, ...)"
_match = re.compile(r"question|option:(answer|wrong|[A-Z])").fullmatch
Spans = Annotated[str, Bound(_match, _spans, "texts are given by --keyword")]


@dataclass(frozen=True)
class SteerSettings(Settings):
    """Settings of a steering run: those of a run, where attention is steered to, and how far.

    Args:
        dataset: Registered dataset name, or none to use texts or prompts alone.
        heads: L.H lists and ranges, a file, all, top:K or bottom:K of --run.
        run: Run directory of attention, attribute or collect that top:K ranks by.
        statistic: What top:K ranks by: weight or weight_over_uniform, a method, or a column.
        boost: Factors of the attention weights before they are made to sum to 1 again.
        keyword: Text or list of texts to steer to; every occurrence counts.
        spans: In questions: question, option:answer, option:wrong, option:A (B, C, ...).
        option_part: An option's line (letter and text), its text, or its letter.
        span_offset: Move the spans by so many tokens; what is known of a word may stand later.
        queries: Which tokens look with changed weights: all, or the last and those written.
        random_sets: Random sets of as many other heads, steered alike for comparison.
        profile: Steer each head alone, pick the best on half of the questions, test on the rest.
        profile_top: Heads to pick.
        profile_by: Pick by what steering does, or by attention to the answer's option.
        profile_boost: Boost of the profile; null takes the largest of --boost.
        profile_offsets: Also look for the answer's option so many tokens behind it.
        bootstrap: Draws of the profile's bootstrap intervals.
        texts: Text file, or .jsonl of texts, for next-token loss and perplexity (--keyword).
        text_length: Tokens per window of the text.
        max_texts: Windows of the text at most.
        prompts: JSONL of prompt, keywords and optionally must_include, to be written on.
        generate: New tokens per prompt; of a dataset: of its first --examples questions.
        examples: Questions whose text is written on, with --generate.
        seeds: Sampled answers per prompt.
        temperature: Of the sampling; 0 takes the likeliest token, one answer per prompt.
        distract: Text (or file with it) also put beside every prompt.
        distract_at: Whether it stands before or after the prompt.
        must_include_least: A text that must appear begins once its token is this probable.
    """

    heads: Optional[str] = None
    run: Optional[str] = None
    statistic: str = "auto"
    boost: str = "0.5,1,2,5,20"
    keyword: Optional[Union[list[str], str]] = None
    spans: Optional[Spans] = None
    option_part: Literal["line", "text", "letter"] = "line"
    span_offset: int = 0
    queries: Literal["all", "last"] = "all"
    random_sets: CountFrom0 = 3
    profile: bool = False
    profile_top: Count = 8
    profile_by: Literal["steering", "attention"] = "steering"
    profile_boost: Optional[float] = None
    profile_offsets: CountFrom0 = 6
    bootstrap: Count = 2000
    texts: Optional[str] = None
    text_length: TextLength = 256
    max_texts: Count = 32
    prompts: Optional[str] = None
    generate: CountFrom0 = 0
    examples: Count = 5
    seeds: Count = 3
    temperature: Size = 0.8
    distract: Optional[str] = None
    distract_at: Literal["before", "after"] = "after"
    must_include_least: Size = 0.1
    experiment_name: DirName = "steer"
    uses: ClassVar = (*STUDY, *BATCHES, *CHECKPOINTS)
    needs: ClassVar = {"distract": "prompts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.boosts
        if self.profile_boost is not None:
            _factor("profile_boost", self.profile_boost)
        self._check_heads()
        self._check_sources()

    @property
    def boosts(self) -> tuple[float, ...]:
        """The factors, each once, in ascending order."""
        parts = [part.strip() for part in str(self.boost).strip("[]() ").split(",")]
        return tuple(sorted({_factor("boost", part) for part in parts}))

    @property
    def keywords(self) -> tuple[str, ...]:
        """The texts to steer to."""
        if self.keyword is None:
            return ()
        return (self.keyword,) if isinstance(self.keyword, str) else tuple(self.keyword)

    def _check_heads(self) -> None:
        if self.profile == (self.heads is not None):
            found = f"heads {self.heads} and profile" if self.profile else "neither"
            raise InputError(
                f"heads: expected either --heads or --profile, which picks them, found {found}; "
                "try --heads all"
            )
        if self.profile and (self.prompts is not None or self.dataset == "none"):
            raise InputError(
                "profile: expected questions to pick heads on, found none; give --dataset, and "
                "its heads.json to --heads for prompts or texts"
            )

    def _check_sources(self) -> None:
        if self.prompts is not None:
            if self.texts or self.spans or self.keyword:
                raise InputError(
                    "prompts: expected neither texts nor spans nor keyword with it, found one of "
                    "them; keywords stand in the file"
                )
            if self.generate < 1:
                raise InputError(
                    "generate: expected a number of new tokens for --prompts, found 0; set "
                    "--generate 64"
                )
            return
        if self.dataset == "none" and self.texts is None:
            raise InputError(
                "dataset: expected questions, texts or prompts to run on, found none; give "
                "--dataset and --data_dir, --texts FILE or --prompts FILE"
            )
        if self.dataset != "none" and (self.spans is None) == (self.keyword is None):
            raise InputError(
                "spans: expected either spans (question, option:answer, option:wrong, option:A) "
                f"or keyword to steer to, found {'both' if self.spans else 'neither'}"
            )
        if self.texts is not None and self.keyword is None:
            raise InputError(
                "keyword: expected a text to steer to in --texts, found none; give --keyword"
            )


def _factor(name: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InputError(
            f"{name}: expected numbers of 0 or more such as 0.5,1,2,5,20, found {value!r}"
        )
    return number
