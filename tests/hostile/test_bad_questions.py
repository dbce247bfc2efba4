"""Questions that are damaged or hostile: one clear line each; odd but fine ones: read right."""

import gzip
import json

from conftest import question_record, write_jsonl
from hostile import Cases, questions, raw

from tl_headnorm import load_questions

case = Cases()


def hf(**changes):
    return {**question_record(0, layout="hf"), **changes}


def options(n):
    """A question with n options."""
    labels = [str(i + 1) for i in range(n)]
    texts = [f"option {label}" for label in labels]
    return hf(choices={"text": texts, "label": labels}, answerKey=str(n))


def jsonl(*records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


@case("data_dir: expected an existing file or directory, found nothing at ", "check the path, or")
def missing_data(folder, model):
    return {"data_dir": folder / "none.jsonl"}


@case("empty.jsonl: expected questions, found an empty file")
def empty_file(folder, model):
    (folder / "empty.jsonl").touch()
    return {"data_dir": folder / "empty.jsonl"}


@case("no usable question in ", "blank.jsonl: ", "found none: it is empty")
def blank_lines_only(folder, model):
    (folder / "blank.jsonl").write_text("\n\n")
    return {"data_dir": folder / "blank.jsonl"}


@case("data_dir: expected the test split in ", "found nothing")
def empty_directory(folder, model):
    (folder / "nothing").mkdir()
    return {"data_dir": folder / "nothing"}


@case("questions.csv: expected a .jsonl, .parquet or .arrow file")
def a_table(folder, model):
    (folder / "questions.csv").write_text("question,answer\n")
    return {"data_dir": folder / "questions.csv"}


@case("test.parquet: expected a parquet file (")
def no_parquet_inside(folder, model):
    (folder / "test.parquet").write_text("not parquet")
    return {"data_dir": folder / "test.parquet"}


@case("x-test.arrow: expected an Arrow stream (")
def no_arrow_inside(folder, model):
    (folder / "x-test.arrow").write_text("not arrow at all, but long enough")
    return {"data_dir": folder / "x-test.arrow"}


@case("questions.jsonl, line 2: expected one JSON object, found a broken line (",
      "mend it, or pass --on_bad_record skip to count and skip")  # fmt: skip
def broken_line(folder, model):
    return {"data_dir": questions(folder, question_record(0), '{"id": "q1", ')}


@case("questions.jsonl, line 1: expected one JSON object, found a broken line (")
def indented_json(folder, model):
    return {"data_dir": questions(folder, json.dumps([question_record(0)], indent=1))}


@case("questions.jsonl, line 1: expected choices with the lists text and label")
def another_layout(folder, model):
    return {"data_dir": questions(folder, {"question": "Why?", "options": ["a"], "answer": 1})}


@case("no usable question in ", "expected questions with 4 or 5 options, found none: 3 options (2)")
def no_usable_question(folder, model):
    return {"data_dir": questions(folder, question_record(0, 3), question_record(1, 3))}


@case("no usable question in ", "found none: malformed record (1)")
def all_skipped(folder, model):
    return {"data_dir": questions(folder, "{"), "on_bad_record": "skip"}


@case("split: expected test, validation (dev) or train, found 'testing'")
def unknown_split(folder, model):
    return {"split": "testing"}


@case("unknown dataset 'arc-challenge'; did you mean 'arc_challenge'? Expected one of: arc_cha")
def unknown_dataset(folder, model):
    return {"dataset": "arc-challenge"}


@case("data_dir: expected a file or directory for this dataset, found none")
def no_data_given(folder, model):
    return {"dataset": "multiple_choice", "data_dir": "null"}


@case(
    "questions.jsonl, line 1: expected one JSON object, found a broken line (Invalid control char"
)
def a_nul_byte(folder, model):
    return {"data_dir": raw(folder, jsonl(question_record(0)).replace(b"planet", b"pl\0net"))}


@case("questions.jsonl, line 1: expected UTF-8 text, found byte 0xff; save the file as UTF-8; mend")
def utf_16(folder, model):
    return {"data_dir": raw(folder, jsonl(question_record(0)).decode().encode("utf-16"))}


@case("questions.jsonl, line 1: expected one JSON object, found a broken line (Expecting property")
def utf_16_without_a_mark(folder, model):
    return {"data_dir": raw(folder, jsonl(question_record(0)).decode().encode("utf-16-le"))}


@case("questions.jsonl, line 2: expected UTF-8 text, found byte 0xe9; mend it")
def latin_1(folder, model):
    text = jsonl(question_record(0), {**question_record(1), "id": "café"}).decode()
    return {"data_dir": raw(folder, text.encode("latin-1"))}


@case(
    "questions.jsonl, line 2: expected one JSON object, found a broken line (Unexpected UTF-8 BOM"
)
def two_files_joined(folder, model):
    one = b"\xef\xbb\xbf" + jsonl(question_record(0))
    return {"data_dir": raw(folder, one + one)}


@case("questions.jsonl, line 1: expected one JSON object, found a broken line (Extra data: line 1")
def line_ends_of_old_macs(folder, model):
    data = jsonl(question_record(0), question_record(1)).replace(b"\n", b"\r")
    return {"data_dir": raw(folder, data)}


@case("questions.jsonl, line 1: expected UTF-8 text, found byte 0x8b")
def compressed(folder, model):
    return {"data_dir": raw(folder, gzip.compress(jsonl(question_record(0))))}


@case("questions.jsonl, line 1: expected one JSON object, found a broken line (Expecting value")
def a_web_page(folder, model):
    return {"data_dir": raw(folder, b"<!DOCTYPE html><html>")}


@case("questions.jsonl, line 1: expected an object, found str")
def a_huge_line_of_text(folder, model):
    return {"data_dir": raw(folder, b'"' + b"x" * 20_000_000 + b'"')}


@case("questions.jsonl, line 1: expected one JSON object, found a broken line (maximum recursion")
def deeply_nested(folder, model):
    return {"data_dir": raw(folder, b'{"a":' * 100_000)}


@case("questions.jsonl, line 1: expected one JSON object, found a broken line (Exceeds the limit")
def a_number_of_5000_digits(folder, model):
    return {"data_dir": raw(folder, b'{"id": ' + b"9" * 5000 + b"}")}


@case(
    "questions.jsonl, line 1: expected one JSON object, found a broken line (the key 'answerKey' t"
)
def a_key_twice(folder, model):
    data = jsonl(question_record(0)).replace(b'"answerKey"', b'"answerKey": "B", "answerKey"')
    return {"data_dir": raw(folder, data)}


@case("line 2: expected an id of its own, found 'q0' again, which an earlier question has; mend it")
def an_id_twice(folder, model):
    return {"data_dir": questions(folder, question_record(0), {**question_record(1), "id": "q0"})}


@case("line 1: expected text or a number under 'id', found list")
def a_list_as_id(folder, model):
    return {"data_dir": questions(folder, {**question_record(0), "id": ["q0"]})}


@case("line 1: expected different labels, found ['A', 'A', 'C', 'D']")
def a_label_twice(folder, model):
    choices = {"text": ["a", "b", "c", "d"], "label": ["A", "A", "C", "D"]}
    return {"data_dir": questions(folder, hf(choices=choices))}


@case("line 1: expected a label of text for each option, found nothing")
def no_label(folder, model):
    choices = {"text": ["a", "b", "c", "d"], "label": [None, "B", "C", "D"]}
    return {"data_dir": questions(folder, hf(choices=choices))}


@case("line 1: expected text in every option, found ''")
def an_empty_option(folder, model):
    choices = {"text": ["a", "b", "", "d"], "label": ["A", "B", "C", "D"]}
    return {"data_dir": questions(folder, hf(choices=choices))}


@case("line 1: expected options, found none")
def no_options(folder, model):
    return {"data_dir": questions(folder, hf(choices={"text": [], "label": []}))}


@case("expected questions with 4 or 5 options, found none: 1 options (1)")
def a_single_option(folder, model):
    return {"data_dir": questions(folder, options(1))}


@case("expected questions with 4 or 5 options, found none: 26 options (1)")
def twenty_six_options_unasked(folder, model):
    return {"data_dir": questions(folder, options(26))}


@case("expected questions with 26 options, found none: 27 options (1)")
def more_options_than_letters(folder, model):
    return {"data_dir": questions(folder, options(27)), "n_options": "[26]"}


@case("line 1: expected answerKey among the labels ['A', 'B', 'C', 'D'], found 'E'")
def an_answer_that_is_no_option(folder, model):
    return {"data_dir": questions(folder, hf(answerKey="E"))}


@case("line 1: expected a label under 'answerKey', found nothing")
def no_answer(folder, model):
    return {"data_dir": questions(folder, hf(answerKey=None))}


@case("line 1: expected a question, found an empty one")
def an_empty_question(folder, model):
    return {"data_dir": questions(folder, hf(question=" \t\n"))}


@case("line 1: expected Unicode text, found half a surrogate pair ('\\ud83e')")
def half_an_emoji(folder, model):
    data = jsonl(question_record(0)).replace(b"planet", b"\\ud83e")
    return {"data_dir": raw(folder, data)}


@case("found half a surrogate pair ('\\udcff')")
def half_a_character_in_the_id(folder, model):
    return {"data_dir": raw(folder, jsonl(question_record(0)).replace(b'"q0"', b'"\\udcff"'))}


@case("an id of its own, found '\\x1b[2J\\x1b[31mgone\\x07\\u202e' again")
def an_id_that_steers_the_terminal(folder, model):
    record = {**question_record(0), "id": "\x1b[2J\x1b[31mgone\x07\u202e"}
    return {"data_dir": questions(folder, record, record)}


@case("unknown template 'arc_mcq_v2'; did you mean 'arc_mcq_v1'? Expected one of: arc_mcq_v1, ")
def unknown_template(folder, model):
    return {"template_name": "arc_mcq_v2"}


@case("template: expected Jinja2, found ")
def broken_template(folder, model):
    return {"template": "{{ question"}


@case("template: could not be rendered ('qestion' is undefined); it may use question, options")
def misspelt_variable(folder, model):
    return {"template": "{{ qestion }}"}


@case("template: could not be rendered (", "is unsafe")
def template_that_reaches_out(folder, model):
    return {"template": "{{ question }}{{ ''.__class__.__mro__ }}"}


@case("template: expected {{ question }} or ", "found the same text for every question")
def single_braces(folder, model):
    return {"template": "Q: {question} A: "}


@case("template: expected Jinja2 text with {{ question }} or a readable file, found 'prompt.j2'")
def missing_template_file(folder, model):
    return {"template": "prompt.j2"}


@case("few_shot: expected data_dir to be a directory with a train or dev split, found one split ")
def few_shot_from_a_file(folder, model):
    return {"few_shot": 2}


@case("few_shot: expected a train or dev split to draw from, found none (data_dir: expected the ")
def few_shot_without_train(folder, model):
    write_jsonl(folder / "data" / "test.jsonl", [question_record(0)])
    return {"few_shot": 1, "data_dir": folder / "data"}


@case("few_shot: expected at least 4 examples to draw 3 from, found 2; lower --few_shot")
def few_shot_too_many(folder, model):
    write_jsonl(folder / "data" / "test.jsonl", [question_record(0)])
    write_jsonl(folder / "data" / "train.jsonl", [question_record(1), question_record(2)])
    return {"few_shot": 3, "data_dir": folder / "data"}


@case("template: could not be rendered (", "is unsafe")
def a_template_file_that_reaches_out(folder, model):
    return {"template": raw(folder, b"{{ question }}{{ question.__class__.mro() }}", "evil.j2")}


@case("template: could not be rendered (", "is unsafe")
def a_template_that_reaches_the_modules(folder, model):
    attack = b"{{ question }}{{ cycler.__init__.__globals__.os.system('touch marker') }}"
    return {"template": raw(folder, attack, "evil.j2")}


@case("template: could not be rendered (Range too big")
def a_template_that_never_ends(folder, model):
    loop = b"{{ question }}{% for i in range(10**12) %}{% endfor %}"
    return {"template": raw(folder, loop, "loop.j2")}


@case("template: expected Jinja2 text with {{ question }} or a readable file, found ", "utf-8")
def a_template_file_that_is_no_text(folder, model):
    return {"template": raw(folder, b"\xff\xfe{\0", "binary.j2")}


@case("template: expected {{ question }} or ", "found the same text for every question")
def an_empty_template_file(folder, model):
    return {"template": raw(folder, b"", "empty.j2")}


@case("chat: expected prompts without special tokens, found '</s>' in sample q0; change that quest")
def a_special_token_in_a_conversation(folder, model):
    """Before the tokenizer is asked for a chat template it is given one."""
    import shutil

    path = shutil.copytree(model, folder / "chatty")
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    record = hf(question="What ends with </s>?")
    return {"model_path": path, "data_dir": questions(folder, record), "chat": "true"}


@case.table
def test_one_clear_line(name, run_cli, flags, tmp_path, llama_dir):
    case.check(name, run_cli, flags, tmp_path, llama_dir)


def test_the_smallest_change_is_what_fails(run_cli, flags):
    """With nothing replaced the same flags run, so each case fails for its own reason."""
    assert run_cli("collect", *flags({"max_samples": 2})).code == 0


def test_enough_cases():
    """Over all tables; the other files hold their own."""
    import test_bad_runs
    import test_bad_settings
    import test_bad_weights

    tables = [case, test_bad_weights.case, test_bad_settings.case, test_bad_runs.case]
    assert sum(map(len, tables)) >= 60


def test_skipping_a_bad_record_is_counted(run_cli, flags, tmp_path):
    data = questions(tmp_path, question_record(0), "{", question_record(1), question_record(2, 3))
    run = run_cli("collect", *flags({"data_dir": data, "on_bad_record": "skip"})).run_dir
    meta = json.loads((run / "meta.json").read_text())
    assert meta["num_processed"] == 2
    assert meta["num_skipped"] == {"malformed record": 1, "3 options": 1}


def test_a_repeated_id_can_be_skipped(tmp_path):
    data = questions(tmp_path, question_record(0), question_record(0), question_record(1))
    found = load_questions(data_dir=data, on_bad_record="skip")
    assert [q.id for q in found] == ["q0", "q1"]
    assert found.skipped == {"malformed record": 1}


def test_an_earlier_run_is_left_alone(run_cli, flags, tmp_path):
    run = run_cli("collect", *flags({"max_samples": 1})).run_dir
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert run_cli("collect", *flags({"few_shot": 2})).code == 2
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [run.name]
