"""Text among tokens: every occurrence by characters, and labels a reader can read."""

import pytest
from conftest import prompts, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_headnorm.data.spans import TokenText, encode_text, find_spans, positions, token_labels
from tl_headnorm.data.templates import Sample
from tl_headnorm.data.tokens import encode
from tl_headnorm.errors import InputError

CLIMATE = "climate is weather over time; the climate here is dry. Climates differ."


@pytest.fixture(scope="module")
def stories(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "stories260K")


@pytest.fixture(scope="module")
def joined():
    """A tokenizer in which " climate" is one token and another one than "climate"."""
    return train_tokenizer([CLIMATE] * 50 + prompts(4))


def said(tokens, tokenizer, span):
    return tokenizer.decode(list(tokens.ids[span.start : span.stop]))


def test_every_occurrence_with_and_without_a_space(joined):
    tokens = encode_text(joined, CLIMATE)
    spans = find_spans(tokens, "climate")
    assert [span.char_start for span in spans] == [0, CLIMATE.index("the climate") + 4]
    assert [said(tokens, joined, span).strip() for span in spans] == ["climate", "climate"]
    # The rival looks for the keyword's own token ids and misses the one after a space.
    ids = joined("climate", add_special_tokens=False)["input_ids"]
    row = list(tokens.ids)
    rival = [i for i in range(len(row)) if row[i : i + len(ids)] == ids]
    assert len(rival) == 1


def test_the_ids_are_those_of_every_other_command(joined, stories):
    for tokenizer in (joined, stories):
        text = "Ünïcode 🙂 and 气候.\n\nAnswer: "
        sample = Sample(text, "A", ("A", "B"), "A", {})
        for bos in (True, False):
            known = encode([sample], tokenizer, prepend_bos=bos)[0].ids
            assert encode_text(tokenizer, text, prepend_bos=bos).ids == known
        cut = encode([sample], tokenizer, max_length=9)[0].ids
        assert encode_text(tokenizer, text, max_length=9).ids == cut


@pytest.mark.parametrize("keyword", ["🙂", "气候", "候 c", "e\n", "im", " time,"])
def test_characters_of_several_tokens(joined, stories, keyword):
    text = "Once upon a 🙂 time, 气候 climate\n x 🙂 time, 气候 climate\n"
    for tokenizer in (joined, stories):
        tokens = encode_text(tokenizer, text)
        spans = find_spans(tokens, keyword)
        assert len(spans) == text.count(keyword)
        for span in spans:
            assert keyword.strip() in said(tokens, tokenizer, span)
            inner = tokens.offsets[span.start][1], tokens.offsets[span.stop - 1][0]
            assert inner[0] > span.char_start  # no token too many on either side
            assert inner[1] < span.char_stop


WORDS = st.lists(
    st.sampled_from(["a", "ab", "🙂", "气候", "é", "\n", " ", ".", "climate"]), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS, st.sampled_from(["a", "🙂", "候", "é", "climate", "b c"]))
def test_spans_cover_what_is_asked_for(joined, before, after, keyword):
    """A span's tokens contain the keyword's characters; no occurrence is missed."""
    text = "x" + "".join(before) + keyword + "".join(after)
    tokens = encode_text(joined, text)
    spans = find_spans(tokens, keyword)
    starts = [i for i in range(len(text)) if text.startswith(keyword, i)]
    assert [span.char_start for span in spans] == starts
    for span in spans:
        first, last = tokens.offsets[span.start], tokens.offsets[span.stop - 1]
        assert keyword in text[first[0] : last[1]]


def test_overlapping_occurrences_count_their_tokens_once(joined):
    tokens = encode_text(joined, "x banana y")
    spans = find_spans(tokens, "ana")
    assert [span.char_start for span in spans] == [3, 5]
    assert (
        len(positions(spans)) == len(set(positions(spans))) <= sum(len(s.positions) for s in spans)
    )


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("CLIMATE", "keyword: expected a text that stands in the prompt, found 'CLIMATE', which "
         "does not; did you mean 'climate' (in another case)?"),
        ("climat over", "found 'climat over', which does not; did you mean"),
        ("wether", "did you mean 'weather'?"),
        ("zebra", "found 'zebra', which does not"),
        (" ", "keyword: expected a text to look for, found ' '"),
    ],
)  # fmt: skip
def test_absent(joined, keyword, message):
    with pytest.raises(InputError) as caught:
        find_spans(encode_text(joined, CLIMATE), keyword)
    assert message in str(caught.value)


def test_absent_in_another_form_of_unicode(joined):
    tokens = encode_text(joined, "un café au lait, 气候变化")
    with pytest.raises(InputError, match="in another Unicode form"):
        find_spans(tokens, "cafe\u0301")
    with pytest.raises(InputError, match="did you mean '气候变化'"):
        find_spans(tokens, "气侯变化", name="query")


def test_what_was_cut_is_not_found(joined):
    long = encode_text(joined, CLIMATE)
    tokens = encode_text(joined, CLIMATE, max_length=len(long) - 2)
    assert len(tokens) == len(long) - 2
    spans = find_spans(tokens, "climate")
    assert len(spans) == 1
    assert said(tokens, joined, spans[0]).strip() == "climate"
    with pytest.raises(InputError, match="only where the prompt was cut"):
        find_spans(encode_text(joined, CLIMATE, max_length=4), "weather")


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer = train_tokenizer(["a"])

    class Slow(type(tokenizer)):
        is_fast = False

    with pytest.raises(InputError, match="expected one that knows its tokens' characters"):
        encode_text(Slow(tokenizer_object=tokenizer.backend_tokenizer), "a")
    with pytest.raises(InputError, match="expected a text with tokens"):
        encode_text(tokenizer, "", prepend_bos=False)


def test_bos_alone(joined):
    assert encode_text(joined, "") == TokenText("", (0,), ((0, 0),))


def test_labels_read_as_the_text_does(joined, stories):
    text = "Once upon a 🙂 time, 气候 <s> x\n"
    for tokenizer in (joined, stories):
        tokens = encode_text(tokenizer, text)
        labels = token_labels(tokenizer, tokens.ids)
        assert len(labels) == len(tokens)
        assert labels[0] == "<s>"
        assert not any("�" in label or "Ġ" in label or "▁" in label for label in labels)
        parts = [label for label in labels if "🙂" in label]
        assert [part.split()[-1] for part in parts] == ["1/4", "2/4", "3/4", "4/4"]
        whole = "".join(label for label in labels[1:] if "/" not in label)
        assert whole.replace(" ", "") == text.replace(" ", "").replace("🙂", "").replace("气候", "")
        assert "�" in token_labels(tokenizer, tokens.ids[: labels.index(parts[2])])
