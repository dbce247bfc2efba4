"""Questions that are odd and fine: read right, and special tokens they spell stay text."""

import json

import pytest
from conftest import prompts, question_record, train_tokenizer
from hostile import questions, raw
from test_bad_questions import hf, options

from tl_headnorm import load_questions, load_run
from tl_headnorm.data.chat import special_token_in
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import Question, parse_record
from tl_headnorm.data.templates import build_samples, get_template
from tl_headnorm.data.tokens import build_sft_example, encode
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings

ODD = {
    "emoji": "What is 🧪 next to 👩\u200d🔬 and 👍🏽?",
    "right to left": "ما هو أقرب كوكب إلى الشمس؟ מה קרוב לשמש?",
    "overriding marks": "a \u202eb\u202c c\ufeffd\u200e",
    "combining": "e\u0301 and \u00e9, n\u0303 ﬁ ½ Ǆ",
    "control characters": "bell \x07, escape \x1b[31m, delete \x7f, NUL \0",
    "line separators": "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1c",
    "beyond the plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀 \U0010ffff",
    "html": "<script>alert('x')</script> &amp; <b>",
    "braces": "{{ question }} {% raw %} ${x} $y$ \\alpha %s {0}",
    "spaces": "two  spaces\ttab",
    "long": "word " * 5000,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_odd_text_is_read_as_it_stands(name, ascii_only, tmp_path):
    text = ODD[name]
    texts = [f"{text} {i}" for i in range(4)]
    record = hf(id=text, question=text, choices={"text": texts, "label": list("ABCD")})
    data = json.dumps(record, ensure_ascii=ascii_only).encode() + b"\n"
    (question,) = load_questions(data_dir=raw(tmp_path, data))
    assert (question.id, question.stem, question.options) == (text, text, tuple(texts))


@pytest.mark.parametrize("name", ODD)
def test_odd_text_reaches_the_model_as_it_stands(name, bpe):
    question = Question("q", ODD[name], ("a", "b", "c", "d"), tuple("ABCD"), 0)
    (sample,) = build_samples([question], get_template("arc_mcq_v1"))
    (encoded,) = encode([sample], bpe, max_length=10**6, score=True)
    assert bpe.decode(encoded.ids[1:]) == sample.prompt_text
    assert ODD[name] in sample.prompt_text


def test_odd_runs_are_written_and_read_back(run_cli, flags, tmp_path):
    records = [hf(id=text, question=text) for text in ODD.values()]
    run = run_cli("collect", *flags({"data_dir": questions(tmp_path, *records)})).run_dir
    assert load_run(run)["sample_id"].values.tolist() == list(ODD.values())


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \n"])
@pytest.mark.parametrize("last", [True, False])
def test_marks_and_line_ends(mark, end, last, tmp_path):
    lines = [json.dumps(question_record(i)).encode() for i in range(3)]
    found = load_questions(data_dir=raw(tmp_path, mark + end.join(lines) + (end if last else b"")))
    expected = [parse_record(question_record(i)) for i in range(3)]
    assert [(q.id, q.stem, q.options, q.answer) for q in found] == [
        (q.id, q.stem, q.options, q.answer) for q in expected
    ]


def test_a_huge_record(tmp_path):
    record = {**question_record(0), "explanation": "x" * 30_000_000}
    (question,) = load_questions(data_dir=questions(tmp_path, record))
    assert question.id == "q0"


@pytest.mark.parametrize("n", [2, 26])
def test_two_and_twenty_six_options(n, tmp_path, run_cli, flags):
    data = questions(tmp_path, options(n))
    (question,) = load_questions(data_dir=data, n_options=(n,))
    assert question.letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:n]
    assert (question.answer, question.answer_letter) == (n - 1, question.letters[-1])
    (sample,) = build_samples([question], get_template("arc_mcq_v1"))
    assert f"\n{question.letters[-1]}. option {n}\n" in sample.prompt_text
    flagged = flags({"data_dir": data, "n_options": f"[{n}]", "max_length": 512})
    run = run_cli("collect", *flagged).run_dir
    assert json.loads((run / "meta.json").read_text())["num_processed"] == 1


# Special tokens spelled in a question stay text


@pytest.fixture(scope="module")
def tokenizers(bpe, shared_data):
    """Several kinds: role tokens, ones without a role, and found in any case."""
    from tokenizers import AddedToken, normalizers
    from transformers import AutoTokenizer

    from tl_headnorm.builtin import model_dir

    llama3 = train_tokenizer(prompts())
    names = ["<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_0|>"]
    llama3.add_tokens([AddedToken(name, special=True) for name in names])
    folded = train_tokenizer([p.lower() for p in prompts()])
    folded.backend_tokenizer.normalizer = normalizers.Lowercase()
    folded.add_tokens([AddedToken("<|end|>", special=True, normalized=True)])
    return {
        "byte-level": bpe,
        "like Llama 3's": llama3,
        "in any case": folded,
        "sentencepiece": AutoTokenizer.from_pretrained(shared_data / "stories260K"),
        "built-in": AutoTokenizer.from_pretrained(model_dir()),
    }


KINDS = ["byte-level", "like Llama 3's", "in any case", "sentencepiece", "built-in"]


def special_ids(tokenizer):
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def spelled(tokenizer):
    """A question that spells every special token, also in capitals, and more."""
    texts = [str(t) for t in tokenizer.added_tokens_decoder.values()]
    text = " ".join([*texts, *[t.upper() for t in texts], "<|eot_id|><s></s>[INST]<|im_end|>"])
    return Question("q", text, (f"a{text}", "b", f"{text}c", "d"), tuple("ABCD"), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few_shot", [0, 1])
def test_spelled_special_tokens_stay_text(kind, few_shot, tokenizers):
    tokenizer = tokenizers[kind]
    question = spelled(tokenizer)
    twin = Question("other", f"Why {question.stem}", question.options, question.labels, 2)
    third = Question("third", f"How {question.stem}", question.options, question.labels, 2)
    template = get_template("arc_mcq_v1")
    (sample,) = build_samples([question], template, examples=[twin, third], few_shot=few_shot)
    (encoded,) = encode([sample], tokenizer, max_length=10**6)
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert not set(encoded.ids[1:]) & special_ids(tokenizer)
    plain = tokenizer(sample.prompt_text, add_special_tokens=False).input_ids
    assert set(plain) & special_ids(tokenizer), "the rival, a plain call, makes them special"
    learned = build_sft_example(sample, tokenizer)
    assert not set(learned["input_ids"][1:]) & special_ids(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_with_one_is_refused(kind, tokenizers):
    tokenizer = tokenizers[kind]
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        for token in tokenizer.added_tokens_decoder.values():
            assert special_token_in(f"What is {token}?", tokenizer) == str(token)
            question = Question("q7", f"What is {token}?", tuple("abcd"), tuple("ABCD"), 0)
            with pytest.raises(InputError, match=r"found .* in sample q7; change that question"):
                prepare(tokenizer, 10**6, [question], Settings(chat=True, max_length=10**5))
    finally:
        tokenizer.chat_template = before


def test_one_without_a_role_is_seen_too(tokenizers):
    """The rival, a search for `all_special_tokens`, overlooks Llama 3's headers."""
    tokenizer = tokenizers["like Llama 3's"]
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    assert special_token_in("an <|eot_id|>", tokenizer) == "<|eot_id|>"
    folded = tokenizers["in any case"]
    assert special_token_in("an <|END|>", folded) == "<|end|>"
    assert special_token_in("an <|en d|>", folded) is None
