"""Settings of `attention`: prompts, heads, keywords, generation, distraction."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Optional, Union

from tl_headnorm.bounds import Count, CountFrom0, DirName, Size
from tl_headnorm.errors import InputError
from tl_headnorm.settings import STUDY, Settings

Several = Optional[Union[list[str], str]]
SOURCES = ("prompt", "question", "prompts")


@dataclass(frozen=True)
class AttentionSettings(Settings):
    """Settings of a look at attention. Give one of prompt, question and prompts.

    Args:
        prompt: The text to look at.
        question: A question of the dataset, by its id or its place from 0.
        prompts: File of prompts: .txt, one a line, or .jsonl of texts or {prompt, keywords}.
        max_samples: Prompts of the file at most; -1 takes all.
        max_length: Longest prompt in tokens; a longer one is refused, a question's cut.
        layers: Layers looked at, such as 0,3-5 or all.
        heads: Heads kept whole: L.H, L.H-H, L.*, all or a file; null is as many as fit.
        keep_mb: Memory for whole patterns per prompt, in MB of float16.
        pages: Prompts of a file that get patterns and a page; the others are only measured.
        local_window: Nearest tokens, the query among them, that the local score takes.
        repeat_length: Random tokens repeated for the induction score; 0 leaves it out.
        keyword: Text, or a list of texts, whose attention is measured.
        match: exact, or semantic: where a keyword is absent, the nearest word by embeddings.
        query: Text whose tokens look; null is the last token.
        generate: New tokens to write; their attention is kept at generate_heads.
        generate_heads: Heads watched while writing; null is heads, or the 8 foremost.
        temperature: 0 writes the likeliest tokens, above it samples.
        top_k: Sample among this many likeliest tokens; null takes all.
        distract: Text, or a file of it, put beside the instruction.
        distract_at: before, inside, after, or all three.
        instruction: Part of the prompt that is the instruction; null is all, without the last
            line where a question ends in its answer's.
        seed: Seed of everything random (sampling, repeated tokens, few-shot choice).
    """

    prompt: Optional[str] = None
    question: Optional[str] = None
    prompts: Optional[str] = None
    max_length: Count = 1024
    layers: str = "all"
    heads: Optional[str] = None
    keep_mb: Size = 32.0
    pages: CountFrom0 = 8
    local_window: Count = 8
    repeat_length: CountFrom0 = 50
    keyword: Several = None
    match: Literal["exact", "semantic"] = "exact"
    query: Optional[str] = None
    generate: CountFrom0 = 0
    generate_heads: Optional[str] = None
    temperature: Size = 0.0
    top_k: Optional[Count] = None
    distract: Optional[str] = None
    distract_at: Literal["before", "inside", "after", "all"] = "all"
    instruction: Optional[str] = None
    experiment_name: DirName = "attention"
    uses: ClassVar = STUDY
    needs: ClassVar = {
        "generate_heads": "generate", "temperature": "generate", "top_k": "temperature",
        "instruction": "distract",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"prompt: expected one of --prompt, --question and --prompts, found "
                f"{' and '.join(given) or 'none'}"
            )
        if self.match == "semantic" and not self.keywords and self.prompts is None:
            raise InputError("match: expected --keyword with it, found none; add --keyword")

    @property
    def keywords(self) -> tuple[str, ...]:
        """The keywords, each once."""
        given = [self.keyword] if isinstance(self.keyword, str) else self.keyword or []
        return tuple(dict.fromkeys(given))

    @property
    def places(self) -> tuple[str, ...]:
        """Where the distracting text goes."""
        return ("before", "inside", "after") if self.distract_at == "all" else (self.distract_at,)
