"""Token ids: one BOS, the right end kept, the answer's own tokens, labels, padding."""

import pytest
import torch
from conftest import prompts, question_record, train_tokenizer

from tl_headnorm.data.batches import batches_in_order, make_batch
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import parse_record
from tl_headnorm.data.templates import Sample, build_samples, get_template
from tl_headnorm.data.tokens import (
    Encoded,
    build_sft_example,
    common_prefix_length,
    encode,
    token_ids,
)
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings

QUESTIONS = [parse_record(question_record(i, 4 + i % 2)) for i in range(5)]


def samples(template="arc_mcq_v1"):
    return build_samples(QUESTIONS, get_template(template))


def sample(prompt, target="A", letters="ABCD"):
    return Sample(prompt, "A", tuple(letters), target, {"id": "made"})


@pytest.fixture(scope="module")
def merging():
    """' A' is one token: the prompt's final space goes into the letter's token."""
    tokenizer = train_tokenizer([f"x {letter}" for letter in "ABCDE" for _ in range(9)], 300)
    assert len(token_ids(tokenizer, [" A"])[0]) == 1
    return tokenizer


@pytest.fixture(scope="module")
def separate():
    """The space stays a token of its own."""
    tokenizer = train_tokenizer(["Answer:Question:Options:"] * 9, 280)
    assert len(token_ids(tokenizer, [" A"])[0]) == 2
    return tokenizer


def count_bos(tokenizer, ids):
    return list(ids).count(tokenizer.bos_token_id)


def test_exactly_one_bos(bpe):
    assert bpe("x").input_ids[0] == bpe.bos_token_id, "a tokenizer that adds BOS by itself"
    for encoded in encode(samples(), bpe):
        assert encoded.ids[0] == bpe.bos_token_id
        assert count_bos(bpe, encoded.ids) == 1
        assert bpe.decode(encoded.ids[1:]) == samples()[encoded.index].prompt_text


def test_no_bos_when_not_wanted_or_not_there(bpe):
    assert count_bos(bpe, encode(samples(), bpe, prepend_bos=False)[0].ids) == 0
    without = train_tokenizer(prompts(4))
    without.bos_token = None
    ids = encode(samples(), without)[0].ids
    assert without.decode(ids) == samples()[0].prompt_text


def test_text_that_spells_a_special_token_stays_text(bpe):
    text = "What is <s> or </s>?\nAnswer: "
    ids = encode([sample(text)], bpe)[0].ids
    assert count_bos(bpe, ids) == 1
    assert bpe.eos_token_id not in ids
    assert bpe.decode(ids[1:]) == text
    assert count_bos(bpe, bpe(text).input_ids) == 2, "the rival, a plain call, makes it special"


@pytest.mark.parametrize("bos", [True, False])
def test_truncation_keeps_bos_and_the_end(bpe, bos):
    whole = encode(samples(), bpe, prepend_bos=bos)
    cut = encode(samples(), bpe, prepend_bos=bos, max_length=40)
    for long, short in zip(whole, cut, strict=True):
        assert short.truncated
        assert not long.truncated
        assert len(short) == 40
        assert short.ids[bos:] == long.ids[-40 + bos :]
        assert bpe.decode(short.ids).endswith("\nAnswer: ")
        assert short.ids[:bos] == long.ids[:bos]
    assert count_bos(bpe, cut[0].ids) == bos


def test_a_prompt_of_exactly_max_length_is_whole(bpe):
    n = len(encode(samples()[:1], bpe)[0])
    assert not encode(samples()[:1], bpe, max_length=n)[0].truncated
    assert encode(samples()[:1], bpe, max_length=n - 1)[0].truncated


def test_no_room_and_no_prompt(bpe):
    with pytest.raises(InputError, match=r"sample q0: expected a prompt with tokens, found none"):
        encode(samples(), bpe, max_length=1)
    with pytest.raises(InputError, match=r"sample made: expected a prompt with tokens"):
        encode([sample("")], bpe)


def test_letters_where_the_space_is_merged(merging):
    for encoded, made in zip(encode(samples(), merging, score=True), samples(), strict=True):
        tokens = merging.convert_ids_to_tokens(list(encoded.letter_ids))
        assert tokens == [f"Ġ{letter}" for letter in made.option_labels]


def test_letters_where_the_space_stands_alone(separate):
    for encoded, made in zip(encode(samples(), separate, score=True), samples(), strict=True):
        tokens = separate.convert_ids_to_tokens(list(encoded.letter_ids))
        assert tokens == list(made.option_labels)


@pytest.mark.parametrize("which", ["merging", "separate"])
def test_letter_tokens_are_those_of_prompt_and_letter(which, request):
    """The whole text tokenised once for each letter, with nothing remembered."""
    tokenizer = request.getfixturevalue(which)
    for encoded, made in zip(encode(samples(), tokenizer, score=True), samples(), strict=True):
        for letter, token in zip(made.option_labels, encoded.letter_ids, strict=True):
            assert token_ids(tokenizer, [made.prompt_text + letter])[0][-1] == token


def test_letters_are_asked_for_only_when_scored(bpe):
    assert encode(samples(), bpe)[0].letter_ids == ()


def test_letters_without_a_token_of_their_own():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"<unk>": 0, "x": 1}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    with pytest.raises(InputError, match="expected one token of its own for each of the letters A"):
        encode([sample("x")], tokenizer, score=True)


def learned(example):
    """The part of an example that is learned; everything before it must be masked."""
    labels, ids = example["labels"], example["input_ids"]
    assert len(labels) == len(ids)
    start = next(i for i, label in enumerate(labels) if label != -100)
    assert set(labels[:start]) <= {-100}
    assert labels[start:] == ids[start:]
    return start, labels[start:]


def test_sft_labels_where_nothing_merges(separate):
    made = samples()[1]
    example = build_sft_example(made, separate)
    start, kept = learned(example)
    assert separate.decode(kept) == made.target_text
    assert separate.decode(example["input_ids"][1:start]) == made.prompt_text
    assert count_bos(separate, example["input_ids"]) == 1


def test_sft_labels_where_the_boundary_is_merged(merging):
    made = samples()[1]
    example = build_sft_example(made, merging)
    start, kept = learned(example)
    assert merging.decode(kept) == f" {made.target_text}"
    assert merging.decode(example["input_ids"][1:]) == made.prompt_text + made.target_text
    # The naive rival masks len(tokenize(prompt)) tokens, the answer among them: nothing is left.
    naive = 1 + len(token_ids(merging, [made.prompt_text])[0])
    assert example["input_ids"][naive:] == []
    assert naive > start


def test_sft_of_option_text(bpe):
    made = samples("cloze")[0]
    example = build_sft_example(made, bpe)
    _, kept = learned(example)
    assert bpe.decode(kept) == made.target_text


def test_sft_without_bos_and_with_eos(separate):
    made = samples()[0]
    plain = build_sft_example(made, separate)
    without = build_sft_example(made, separate, prepend_bos=False)
    assert without["input_ids"] == plain["input_ids"][1:]
    assert without["labels"] == plain["labels"][1:]
    ended = build_sft_example(made, separate, append_eos=True)
    assert ended["input_ids"] == [*plain["input_ids"], separate.eos_token_id]
    assert ended["labels"] == [*plain["labels"], separate.eos_token_id]


def test_sft_eos_of_a_tokenizer_without_one():
    tokenizer = train_tokenizer(["x"], 260)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="append_eos: expected a tokenizer with an EOS token"):
        build_sft_example(samples()[0], tokenizer, append_eos=True)


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 4]) == 2
    assert common_prefix_length([], [1]) == 0


ROWS = [Encoded(0, (5, 6, 7)), Encoded(1, (8,)), Encoded(2, (9, 10))]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7], [8, 3, 3], [9, 10, 3]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        ("left", [[5, 6, 7], [3, 3, 8], [3, 9, 10]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
    ],
)
def test_padding(side, ids, mask):
    batch = make_batch(ROWS, side, pad_id=3)
    assert batch.ids.tolist() == ids
    assert batch.mask.tolist() == mask
    assert len(batch) == 3
    for row, made in enumerate(ROWS):
        assert tuple(batch.ids[row][batch.mask[row].bool()].tolist()) == made.ids


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_sample_is_in_one_batch(size):
    batches = list(batches_in_order(ROWS, size, "right"))
    assert sorted(s.index for b in batches for s in b.samples) == [0, 1, 2]
    assert all(len(b) <= size for b in batches)
    assert sum(int(b.mask.sum()) for b in batches) == 6
    assert all(b.ids.dtype == torch.long for b in batches)


def test_prepare_records_what_it_did(bpe):
    prepared = prepare(bpe, 512, QUESTIONS, Settings(max_length=400))
    record = prepared.record
    first = [e.ids for e in prepared.encoded]
    shared = record["template"]["common_prefix_length"]
    assert all(ids[:shared] == first[0][:shared] for ids in first)
    assert len({ids[shared] for ids in first}) > 1
    assert record["num_tokens"] == sum(map(len, first))
    assert record["num_truncated"] == 0
    assert record["prepend_bos"] is True
    assert set(record["answer_tokens"]) == set("ABCDE")
    for letter, token in record["answer_tokens"].items():
        assert bpe.decode([token["id"]]).strip() == letter


def test_max_length_against_template_and_context(bpe):
    with pytest.raises(InputError, match="expected at most the model's context of 512 tokens, fou"):
        prepare(bpe, 512, QUESTIONS, Settings(max_length=513))
    with pytest.raises(InputError, match=r"room for the template arc_mcq_v1, .* found 20; raise"):
        prepare(bpe, 512, QUESTIONS, Settings(max_length=20))
