"""chat: the prompt as the user's turn, ending where the answer starts."""

import pytest
from conftest import prompts, question_record, train_tokenizer

from tl_headnorm.commands.evaluate.settings import EvaluateSettings
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import parse_record
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKERS = ["<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="module")
def chatty():
    tokenizer = train_tokenizer(prompts())
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def questions():
    return [parse_record(question_record(i)) for i in range(3)]


def test_ids_are_the_tokenizers_own_conversation(chatty, questions):
    plain = prepare(chatty, 512, questions, Settings())
    chat = prepare(chatty, 512, questions, Settings(chat=True))
    for bare, sample, encoded in zip(plain.samples, chat.samples, chat.encoded, strict=True):
        turn = [{"role": "user", "content": bare.prompt_text}]
        ids = chatty.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        assert list(encoded.ids) == list(ids)
        assert encoded.ids.count(chatty.bos_token_id) == 1
        assert chatty.decode(encoded.ids).endswith("<|assistant|>\n")
        assert len(set(encoded.letter_ids)) == 4
        assert sample.prompt_text.startswith("<|user|>")
    assert "chat_sha256" in chat.record["template"]
    assert "chat_sha256" not in plain.record["template"]


def test_letters_are_those_after_the_answers_header(chatty, questions):
    encoded = prepare(chatty, 512, questions, Settings(chat=True)).encoded[0]
    assert chatty.convert_ids_to_tokens(list(encoded.letter_ids)) == ["A", "B", "C", "D"]


def test_without_bos_there_is_none(chatty, questions):
    encoded = prepare(chatty, 512, questions, Settings(chat=True, prepend_bos=False)).encoded
    assert chatty.bos_token_id not in encoded[0].ids


def test_markers_as_plain_text_would_be_wrong(chatty, questions):
    """The naive rival: the rendered conversation tokenised like any other prompt."""
    from tl_headnorm.data.tokens import token_ids

    chat = prepare(chatty, 512, questions, Settings(chat=True))
    rival = token_ids(chatty, [str(chat.samples[0].prompt_text)])[0]
    assert rival != list(chat.encoded[0].ids[1:])


def test_refusals(chatty, questions, bpe):
    with pytest.raises(InputError, match="chat template, found none"):
        prepare(bpe, 512, questions, Settings(chat=True))
    length = len(prepare(chatty, 512, questions, Settings(chat=True)).encoded[0])
    with pytest.raises(InputError, match="found a longer one, sample q0; raise --max_length"):
        prepare(chatty, 512, questions, Settings(chat=True, max_length=length - 1))
    record = question_record(0) | {"id": "odd"}
    record["question"]["stem"] = "What does <|end|> mean?"
    with pytest.raises(InputError, match=r"found '<\|end\|>' in sample odd"):
        prepare(chatty, 512, [parse_record(record)], Settings(chat=True))


def test_cloze_is_refused(chatty, questions):
    from handmade import llama

    from tl_headnorm.commands.evaluate.evaluate import evaluate
    from tl_headnorm.model.loading import load_model

    hf_model = llama(vocab_size=len(chatty))
    model = load_model(hf_model=hf_model, tokenizer=chatty, self_check=False)
    with pytest.raises(InputError, match="chat: expected scoring letter"):
        evaluate(model, questions, EvaluateSettings(scoring="cloze", chat=True))
