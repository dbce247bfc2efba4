"""The command line: help, settings files, overrides, refusals, and what is on stdout."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import tl_headnorm.commands.collect.command
from tl_headnorm.bounds import Checked
from tl_headnorm.cli import COMMANDS, parse
from tl_headnorm.commands.parser import check_config
from tl_headnorm.errors import InputError
from tl_headnorm.settings import Settings

HEAVY = ("torch", "transformer_lens", "transformers", "datasets", "xarray", "plotly", "matplotlib")
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
DEFAULT = ROOT / "configs" / "default.yaml"


def loaded_by(code):
    """(heavy modules loaded, stdout) of a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={"COLUMNS": "80", "PATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, _, found = done.stdout.rpartition("LOADED ")
    return json.loads(found.replace("'", '"')), text


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_quick_and_narrow(command):
    arguments = ["--help"] if command is None else [command, "--help"]
    heavy, text = loaded_by(f"from tl_headnorm.cli import main; assert main({arguments}) == 0")
    assert heavy == []
    assert max(map(len, text.splitlines())) <= 80
    for name in COMMANDS if command is None else [COMMANDS[command].help.split()[0]]:
        assert name in text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_found_by_its_name(name):
    """Its folder holds the settings' class and the function that the table looks up."""
    assert issubclass(COMMANDS[name].settings, Checked)
    module = importlib.import_module(f"tl_headnorm.commands.{name}.command")
    assert callable(getattr(module, f"run_{name}"))


def test_no_folder_without_a_line():
    folders = {p.parent.name for p in (ROOT / "tl_headnorm" / "commands").glob("*/command.py")}
    assert folders == set(COMMANDS)


def test_import_loads_nothing_heavy():
    assert loaded_by("import tl_headnorm; dir(tl_headnorm)")[0] == []


def test_the_guard_can_fail():
    assert "xarray" in loaded_by("import tl_headnorm; tl_headnorm.heatmap")[0]


def test_dir_shows_the_public_names():
    assert sorted(dir(tl_headnorm)) == sorted([*tl_headnorm.__all__, "__version__"])
    assert tl_headnorm.__version__ == "0.1.0"
    assert (ROOT / "tl_headnorm" / "py.typed").is_file()


def test_exported_names_are_there():
    for name in tl_headnorm.__all__:
        assert getattr(tl_headnorm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        _ = tl_headnorm.colect


def test_python_dash_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tl_headnorm", "colect"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "tl-headnorm: unknown command 'colect'; did you mean 'collect'? Expected one of: "
        f"{', '.join(sorted(COMMANDS))}\n"
    )


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_in_the_help_with_a_text(name, run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run_cli("collect", "--help").out
    entry = text.split(f"\n  --{name} ", 1)[1].split("\n  --")[0]
    words = " ".join(entry.split())
    assert "(type: " in words
    described = words.split("(type: ")[0].split(name.upper())[-1].split("}")[-1].split("]")[-1]
    assert len(described.split()) >= 3, f"--{name} has no help text: {entry}"


def test_default_config_is_a_named_run():
    name, settings = parse(["collect", "--config", str(DEFAULT)])
    assert (name, type(settings)) == ("collect", Settings)
    for key, value in yaml.safe_load(DEFAULT.read_text()).items():
        found = getattr(settings, key)
        assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_says_why(config):
    text = config.read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)


def test_no_config_gives_the_defaults():
    assert parse(["collect"]) == ("collect", Settings())


def test_print_config_round_trips(run_cli, tmp_path):
    flags = ["--dtype", "fp32", "--n_options", "[3,4]", "--template", "{{ question }}: ", "--debug"]
    printed = run_cli("collect", *flags, "--print_config")
    assert printed.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(printed.out)
    assert parse(["collect", "--config", str(path)]) == parse(["collect", *flags])
    assert set(yaml.safe_load(printed.out)) == set(FIELDS)


def test_a_flag_overrides_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dtype: fp16\nbatch_size: 3\nseed: 1\n")
    settings = parse(["collect", "--config", str(path), "--dtype", "fp32", "--seed=2"])[1]
    assert (settings.dtype, settings.batch_size, settings.seed) == ("fp32", 3, 2)


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text("dtype: fp16\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    arguments = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    settings = parse(["collect", *arguments])[1]
    assert (settings.dtype, settings.seed) == ("fp16", 2)


def test_switches_stand_alone():
    assert parse(["collect", "--debug"])[1].debug
    assert parse(["collect", "--exclude_first_token", "--token_agg", "all"])[1].exclude_first_token
    assert not parse(["collect", "--prepend_bos", "false"])[1].prepend_bos
    assert not parse(["collect", "--prepend_bos=false"])[1].prepend_bos


@pytest.mark.parametrize("given", ["3,4", "3, 4", "[3,4]", "[3, 4]"])
def test_lists_by_commas(given):
    assert parse(["collect", "--n_options", given])[1].n_options == (3, 4)
    assert parse(["collect", f"--n_options={given}"])[1].n_options == (3, 4)


def test_lists_of_names_and_of_one():
    assert parse(["collect", "--n_options", "4"])[1].n_options == (4,)
    assert parse(["attribute", "--methods", "ig_joint,loo"])[1].methods == ("ig_joint", "loo")
    assert parse(["bench", "--contenders", "hf_forward"])[1].contenders == ["hf_forward"]
    assert parse(["bench", "--contenders", "null"])[1].contenders is None
    assert parse(["compare", "a", "b", "--names", "base,tuned"])[1].names == ["base", "tuned"]
    # A text is one text, commas and all.
    keyword = ["steer", "--heads", "all", "--keyword", "no, never"]
    assert parse(keyword)[1].keywords == ("no, never",)


def test_help_shows_bounds_and_no_type_noise(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run_cli("attribute", "--help").out
    assert "(type: int, 1 or more, default: 32)" in text
    assert "Annotated" not in text
    assert "<function" not in text


REFUSED = {
    "no command": ([], f"expected a command: {', '.join(COMMANDS)}; see tl-headnorm --help"),
    "unknown command": (["colect"], "unknown command 'colect'; did you mean 'collect'?"),
    "flag first": (["--dtype", "fp32", "collect"], "expected a command before the settings"),
    "unknown flag": (
        ["collect", "--max_sampels", "3"],
        "unknown setting 'max_sampels'; did you mean 'max_samples'?; see tl-headnorm collect",
    ),
    "abbreviated flag": (
        ["collect", "--max_sample", "3"],
        "unknown setting 'max_sample'; did you mean 'max_samples'?",
    ),
    "dashes": (["collect", "--max-samples=3"], "unknown setting 'max-samples'; did you mean 'max_"),
    "positional": (["collect", "questions.jsonl"], "expected settings as --name value, found 'que"),
    "no value": (["collect", "--data_dir"], "data_dir: expected one argument"),
    "not a number": (["collect", "--max_samples", "x"], "max_samples: expected a whole number, fo"),
    "half a sample": (["collect", "--max_samples", "1.5"], "expected a whole number, found 1.5"),
    "dtype": (["collect", "--dtype", "float32"], "dtype: expected one of bf16, fp16, fp32, found"),
    "a word in a list": (["collect", "--n_options", "4,x"], "n_options: expected a whole number, "),
    "a broken list": (["collect", "--n_options", "[4"], "n_options: expected a list such as"),
    "number or word": (
        ["collect", "--max_batch_tokens", "many"],
        "max_batch_tokens: expected one of auto or a whole number, found many",
    ),
    "not true or false": (
        ["collect", "--self_check", "no?"],
        "self_check: expected true or false, fou",
    ),
    "no such file": (
        ["collect", "--config", "none.yaml"],
        "expected a YAML file with settings, fou",
    ),
    "a directory": (["collect", "--config", "."], "expected a YAML file with settings, found ."),
}


def untouched(path):
    return not any(path.rglob("*"))


@pytest.mark.parametrize("name", REFUSED)
def test_bad_usage(name, run_cli, tmp_path, monkeypatch):
    arguments, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    result = run_cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.error_line
    assert untouched(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_what_it_does_not_know(command, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("no_such_setting: 1\n")
    for arguments in (["--no_such_setting", "1"], ["--config", "run.yaml"]):
        result = run_cli(command, *arguments)
        assert (result.code, result.out) == (2, "")
        assert "unknown setting 'no_such_setting'" in result.error_line
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


BAD_FILES = {
    "unknown key": (
        "dtype: fp32\nmax_sampels: 3\n",
        ", line 2: unknown setting 'max_sampels'; did",
    ),
    "duplicate": (
        "dtype: fp32\n# a comment\nseed: 1\ndtype: bf16\n",
        ", line 4: expected each setting once, found 'dtype' again (first on line 1); keep one",
    ),
    "a list": ("- dtype\n- fp32\n", ": expected settings as lines 'key: value', found a list"),
    "plain text": ("dtype fp32\n", ": expected settings as lines 'key: value', found plain text"),
    "empty": ("", "found an empty file"),
    "only comments": ("# nothing yet\n", "found an empty file"),
    "broken": ("dtype: [fp32\nseed: 1\n", ", line 2: expected YAML, found a fault ("),
    "tab": ("dtype:\n\t- fp32\n", ", line 2: expected YAML, found a fault ("),
    "wrong type": ("max_samples: many\n", "max_samples: expected a whole number, found many"),
    "true for a number": ("max_samples: true\n", "max_samples: expected a whole number, found Tru"),
    "list for text": ("dtype: [fp32]\n", "dtype: expected one of bf16, fp16, fp32, found ['fp32']"),
    "nested": ("model:\n  path: x\n", ", line 1: unknown setting 'model'; did you mean 'model_pat"),
    "a file in a file": ("config: other.yaml\n", ", line 1: unknown setting 'config'"),
    "value out of range": (
        "batch_size: 0\n",
        "batch_size: expected 1 or more, found 0; set --batc",
    ),
    "nothing for a number": ("batch_size: null\n", "batch_size: expected a value, found null; "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_settings_file(name, run_cli, tmp_path):
    text, message = BAD_FILES[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    result = run_cli("collect", "--config", path, "--output_dir", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert message in result.error_line
    if message.startswith((",", ":")):
        assert f"tl-headnorm: {path}{message}" in result.error_line
    assert not (tmp_path / "out").exists()


def test_without_the_check_a_repeated_key_would_win_silently(tmp_path):
    """The rival: PyYAML takes the last of two."""
    text = BAD_FILES["duplicate"][0]
    assert yaml.safe_load(text)["dtype"] == "bf16"
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="each setting once"):
        check_config(path, FIELDS)


def test_debug_shows_the_traceback(run_cli, tmp_path):
    arguments = ["collect", "--data_dir", tmp_path / "none", "--output_dir", tmp_path]
    assert "Traceback" not in run_cli(*arguments).err
    shown = run_cli(*arguments, "--debug")
    assert shown.code == 2
    assert "Traceback (most recent call last)" in shown.err
    assert shown.err.splitlines()[-1].startswith("tl-headnorm: data_dir: expected an existing")
    (tmp_path / "run.yaml").write_text("debug: true\n")
    assert "Traceback" in run_cli(*arguments, "--config", tmp_path / "run.yaml").err


def test_a_fault_of_ours_is_not_dressed_up_as_the_users(run_cli, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(tl_headnorm.commands.collect.command, "run_collect", fail)
    with pytest.raises(ZeroDivisionError):
        run_cli("collect")


def test_interrupted(run_cli, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tl_headnorm.commands.collect.command, "run_collect", fail)
    result = run_cli("collect")
    assert (result.code, result.err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory.')", "lower --batch_size or --max_length"),
        ("OSError(28, 'No space left on device', 'x.npy')", "found [Errno 28] No space left on de"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, message, run_cli, monkeypatch):
    import torch

    def fail(*_):
        raise eval(error, {"torch": torch})

    monkeypatch.setattr(tl_headnorm.commands.collect.command, "run_collect", fail)
    result = run_cli("collect")
    assert result.code == 2
    assert message in result.error_line


def test_the_last_line_of_stdout_is_the_run_directory(run_cli, small, tmp_path):
    result = run_cli("collect", *small, "--max_samples", 2, "--output_dir", tmp_path)
    assert result.code == 0
    assert result.out == f"{result.run_dir}\n"
    assert (result.run_dir / "meta.json").is_file()
    assert result.run_dir.parent == tmp_path
    assert "2 samples (0 skipped, 0 truncated)" in result.err
    assert "tokens/s" in result.err


def test_validate_says_whether_it_held(run_cli, small, tmp_path, monkeypatch):
    arguments = ["validate", *small, "--max_samples", 2, "--output_dir", tmp_path]
    passed = run_cli(*arguments)
    report = json.loads((passed.run_dir / "validation.json").read_text())
    assert report["passed"]
    assert report["n_samples"] == 2
    assert passed.err.splitlines()[-1] == "passed"
    monkeypatch.setitem(tl_headnorm.oracle.hugging_face.TOLERANCE, "fp32", (0.0, 0.0))
    failed = run_cli(*arguments)
    assert failed.code == 1
    assert "FAILED" in failed.err.splitlines()[-1]
    assert (tmp_path / failed.out.splitlines()[-1] / "validation.json").is_file()


def test_relative_paths_are_relative_to_here(run_cli, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_cli("collect", *small, "--max_samples", 1, "--output_dir", "here")
    assert (tmp_path / result.run_dir).is_dir()
    assert str(result.run_dir).startswith("here/")
