"""What a newcomer will do: each is one clear line, exit code 2, and nothing half-written."""

import json
import shutil

import pytest
import torch
from conftest import question_record, write_jsonl
from safetensors.torch import load_file, save_file

CASES = {}


def case(*messages):
    """Add a case: a function of its folder and the model's that returns the flags to change."""

    def add(function):
        CASES[function.__name__] = (function, messages)
        return function

    return add


def copy_of(model, folder):
    shutil.copytree(model, folder / "model")
    return folder / "model"


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def questions(folder, *records):
    return write_jsonl(folder / "questions.jsonl", records)


# The model


@case("model_path: expected a hub id (owner/name) or an existing directory, found nothing at ",
      "no_model; check the path")  # fmt: skip
def missing_model(folder, model):
    return {"model_path": folder / "no_model"}


@case("model_path: expected a directory in Hugging Face format, found no config.json in ")
def no_config(folder, model):
    return {"model_path": folder}


@case("model_path: expected a hub id (owner/name) or an existing directory, found nothing")
def a_file_as_model(folder, model):
    return {"model_path": model / "config.json"}


@case("model_path: the config of ", " could not be read: ")
def broken_config(folder, model):
    path = copy_of(model, folder)
    (path / "config.json").write_text("{")
    return {"model_path": path}


@case("model_path: expected an architecture among", "LlamaForCausalLM", "found BertForMaskedLM in")
def another_architecture(folder, model):
    path = copy_of(model, folder)
    edit_config(path, architectures=["BertForMaskedLM"], model_type="bert")
    return {"model_path": path}


@case("model_path: the weights of ", " could not be read: ")
def damaged_weights(folder, model):
    path = copy_of(model, folder)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    return {"model_path": path}


@case("model_path: the weights of ", " could not be read: ")
def not_safetensors(folder, model):
    path = copy_of(model, folder)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return {"model_path": path}


@case("model_path: the weights of ", " could not be read: ")
def no_weights(folder, model):
    path = copy_of(model, folder)
    (path / "model.safetensors").unlink()
    return {"model_path": path}


@case("model_path: expected all tensors of the architecture in ", "found 2 missing (",
      "model.layers.1.self_attn.o_proj.weight")  # fmt: skip
def missing_tensors(folder, model):
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.self_attn.o_proj.weight"]
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return {"model_path": path}


@case("model_path: the weights of ")
def tensors_of_another_size(folder, model):
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    state[name] = state[name][:, :-10].contiguous()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return {"model_path": path}


@case("model_path: the tokenizer of ", " could not be read: ")
def no_tokenizer(folder, model):
    path = copy_of(model, folder)
    for file in path.glob("tokenizer*"):
        file.unlink()
    return {"model_path": path}


@case("model_path: the config of nobody/nothing could not be read: ", "a hub id that can be reach")
def hub_out_of_reach(folder, model):
    return {"model_path": "nobody/nothing"}


@case("self_check: expected ", "found nan; this model cannot be measured faithfully")
def nan_weights(folder, model):
    return {"model_path": with_nan(folder, model, slice(None))}


@case("head_output_norm: expected finite values, found nan in layer 1, head 2 of sample q",
      "check the weights")  # fmt: skip
def nan_in_one_head(folder, model):
    return {"model_path": with_nan(folder, model, slice(20, 30)), "self_check": "false"}


@case("head_output_norm: expected finite values, found nan in layer 1, head 0 of sample q")
def nan_in_a_whole_layer(folder, model):
    return {"model_path": with_nan(folder, model, slice(None)), "self_check": "false"}


def with_nan(folder, model, rows):
    """NaN in some of layer 1's query rows, ten to a head."""
    path = copy_of(model, folder)
    state = load_file(path / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][rows] = torch.nan
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@case("device_map: expected auto, cpu or a device that is here, found 'cuda:99' (")
def no_such_device(folder, model):
    return {"device_map": "cuda:99"}


@case("device_map: expected auto, cpu or a device that is here, found 'gpu' (")
def misnamed_device(folder, model):
    return {"device_map": "gpu"}


# The questions


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


# The prompts


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


# The numbers


@case("max_samples: expected -1 (all) or a number above 0, found 0; set --max_samples to")
def no_samples(folder, model):
    return {"max_samples": 0}


@case("batch_size: expected 1 or more, found 0; set --batch_size to 1 or more")
def no_batch(folder, model):
    return {"batch_size": 0}


@case("few_shot: expected 0 or more, found -1")
def negative_examples(folder, model):
    return {"few_shot": -1}


@case("n_options: expected numbers from 2 to 26, found [1]; set for example --n_options")
def one_option(folder, model):
    return {"n_options": "[1]"}


@case("exclude_first_token: expected token_agg all, found token_agg last")
def nothing_to_exclude(folder, model):
    return {"exclude_first_token": "true"}


@case("max_length: expected room for the template arc_mcq_v1, which alone takes ", "found 12; rai")
def max_length_below_the_template(folder, model):
    return {"max_length": 12}


@case("max_length: expected at most the model's context of 512 tokens, found 4096; set --max_len")
def max_length_beyond_the_context(folder, model):
    return {"max_length": 4096}


# The output


@case("output_dir: expected a directory that can be written, found ", "choose another with --outp")
def output_below_a_file(folder, model):
    (folder / "file").touch()
    return {"output_dir": folder / "file" / "runs"}


@case("output_dir: expected a directory that can be written, found ")
def output_is_a_file(folder, model):
    (folder / "file").touch()
    return {"output_dir": folder / "file"}


@case("output_dir: expected a directory that can be written, found /proc/x")
def output_in_proc(folder, model):
    return {"output_dir": "/proc/x"}


@case("experiment_name: expected a name without '/', found 'a/b'; use --output_dir to choose the")
def name_with_a_folder(folder, model):
    return {"experiment_name": "a/b"}


@case("output_dir: expected a directory that can be written, found ", "File name too long")
def endless_name(folder, model):
    return {"experiment_name": "x" * 300}


@pytest.fixture
def flags(small, tmp_path):
    def merged(changes):
        """The flags of a small run with some replaced."""
        pairs = dict(zip(small[::2], small[1::2], strict=True))
        pairs["--output_dir"] = tmp_path / "runs"
        pairs.update({f"--{name}": value for name, value in changes.items()})
        return [x for pair in pairs.items() for x in pair]

    return merged


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(name, run_cli, flags, tmp_path, llama_dir):
    make, messages = CASES[name]
    result = run_cli("collect", *flags(make(tmp_path, llama_dir)))
    assert result.code == 2
    assert result.out == ""
    line = lines_but_the_bar(result)
    for message in messages:
        assert message in line
    assert len(line) < 600
    assert "site-packages" not in line
    assert " object at 0x" not in line
    assert not any((tmp_path / "runs").glob("*"))


def lines_but_the_bar(result):
    """The error line; a value that is not finite is found while the progress bar is up."""
    result.err = "".join(
        x for x in result.err.splitlines(True) if not x.startswith(("collect:", "\r"))
    )
    return result.error_line


def test_the_smallest_change_is_what_fails(run_cli, flags):
    """With nothing replaced the same flags run, so each case fails for its own reason."""
    assert run_cli("collect", *flags({"max_samples": 2})).code == 0


def test_fp16_on_a_device_that_cannot(run_cli, flags, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("\"softmax_lastdim_kernel_impl\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch.nn.functional, "softmax", refuse)
    result = run_cli("collect", *flags({"dtype": "fp16"}))
    assert result.code == 2
    assert result.error_line == (
        "tl-headnorm: dtype: expected one that cpu computes, found fp16 "
        "(\"softmax_lastdim_kernel_impl\" not implemented for 'Half'); use --dtype bf16 or "
        "--dtype fp32"
    )
    assert not any((tmp_path / "runs").glob("*"))


def test_skipping_a_bad_record_is_counted(run_cli, flags, tmp_path):
    data = questions(tmp_path, question_record(0), "{", question_record(1), question_record(2, 3))
    run = run_cli("collect", *flags({"data_dir": data, "on_bad_record": "skip"})).run_dir
    meta = json.loads((run / "meta.json").read_text())
    assert meta["num_processed"] == 2
    assert meta["num_skipped"] == {"malformed record": 1, "3 options": 1}


def test_an_earlier_run_is_left_alone(run_cli, flags, tmp_path):
    run = run_cli("collect", *flags({"max_samples": 1})).run_dir
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert run_cli("collect", *flags({"few_shot": 2})).code == 2
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [run.name]
