"""The tiny model's tokenizer: byte-level BPE in which every word of the world is one token.

A leading space belongs to its word, except before a single capital letter, where it is a token
of its own.  So the option letters are the same token everywhere, and a prompt that ends in
``Answer: `` tokenises to a prefix of that prompt with its letter.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .questions import FAMILIES, LETTERS, instruction
from .world import CATEGORIES, COUNTED, FOODS, ITEMS, NAMES, NUMBERS, PLACES, THINGS, TRAIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_PATTERN = r"\n| (?=[A-Z](?![A-Za-z]))| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"


def _corpus() -> list[str]:
    """List text that holds every word and every frame of the grammar."""
    rng = random.Random(0)
    words = (*NAMES, *THINGS, *PLACES, *COUNTED, *NUMBERS, *FOODS, *ITEMS, *CATEGORIES)
    lines = [f"{word} {word}" for word in words]
    lines += [instruction(n) + "Question: x?\nOptions:\nA. x\n\nAnswer: " for n in (4, 5)]
    lines += [make(rng, TRAIN, 4).stem for make in FAMILIES.values() for _ in range(100)]
    return lines + [f"({letter}. {letter}" for letter in LETTERS]


def build() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the result depends on the grammar alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        # The trainer stops by itself once every word of the corpus is one token.
        vocab_size=4096,
        min_frequency=1,
        show_progress=False,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(_corpus(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
