"""Settings out of bounds, from flags and from YAML, and places that cannot be written to.

Misspelt names and wrong types are in test_cli.py.
"""

import math
import re
from dataclasses import fields

import pytest
from hostile import Cases, raw

from tl_headnorm.bounds import bounds_of, check_values
from tl_headnorm.cli import parse
from tl_headnorm.commands.table import COMMANDS
from tl_headnorm.errors import InputError, printable
from tl_headnorm.settings import Settings

case = Cases()


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


@case("seed: expected 0 or more, found -1; set --seed to 0 or more")
def a_negative_seed(folder, model):
    return {"seed": -1}


@case("shard: expected K/N, K from 1 to N, such as 3/16, found '0/4'; set for example --shard 3/16")
def a_shard_counted_from_zero(folder, model):
    return {"shard": "0/4"}


@case(
    "shard: expected at most as many parts as questions, found 7 in ", " for part 9/9; use 7 parts"
)
def more_shards_than_questions(folder, model):
    return {"shard": "9/9"}


@case("n_options: expected a whole number, found x")
def a_word_among_numbers(folder, model):
    return {"n_options": "[4, x]"}


@case("max_batch_tokens: expected auto or a number above 0, found -5")
def no_room_in_a_batch(folder, model):
    return {"max_batch_tokens": -5}


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


@case("experiment_name: expected one line, found 'a\\nb'")
def a_name_of_two_lines(folder, model):
    return {"experiment_name": "a\nb"}


@case("data_dir: expected text in UTF-8 without NUL, found 'a\\x00b'")
def a_path_with_nul(folder, model):
    return {"data_dir": "a\0b"}


@case("data_dir: expected text in UTF-8 without NUL, found '\\udcff'")
def a_path_of_other_bytes(folder, model):
    """As the shell hands over a name that is not UTF-8."""
    return {"data_dir": "\udcff"}


def yaml(text):
    """A case whose settings stand in a file."""

    def make(folder, model):
        data = text if isinstance(text, bytes) else text.encode()
        return {"config": raw(folder, data, "run.yaml")}

    return make


YAML = {
    "a key twice": ("seed: 1\nseed: 2\n", "run.yaml, line 2: expected each setting once, found 's"),
    "a key twice, quoted": ("seed: 1\n'seed': 2\n", "found 'seed' again (first on line 1); keep"),
    "unknown": ("sead: 1\n", "run.yaml, line 1: unknown setting 'sead'; did you mean 'seed'?"),
    "a list as a key": ("? [seed]\n: 1\n", "expected YAML, found a fault (found unhashable key)"),
    "a merge key": ("<<: {seed: 1}\n", "run.yaml, line 1: unknown setting '<<'"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "expected YAML, found a fault (but found another"),
    "NUL": (b"seed: 1\0\n", "expected YAML, found a fault (special characters are not allowed)"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "expected a YAML file with settings, found "),
    "latin-1": (b"model_path: caf\xe9\n", "expected a YAML file with settings, found "),
    "a tag of Python's": ("seed: !!python/object/apply:os.getpid []\n", "found a fault (could n"),
    "an unknown tag": ("seed: !x 1\n", "expected YAML, found a fault (could not determine"),
    "an unknown anchor": ("seed: *x\n", "expected YAML, found a fault (found undefined alias"),
    "a list in itself": ("n_options: &a [*a]\n", "n_options: expected "),
    "a date": ("seed: 2020-01-01\n", "seed: expected a whole number, found 2020-01-01"),
    "text for a number": ("batch_size: eight\n", "batch_size: expected a whole number, found ei"),
    "a fraction": ("batch_size: 1.5\n", "batch_size: expected a whole number, found 1.5"),
    "not a number": ("batch_size: .nan\n", "batch_size: expected a whole number, found nan"),
    "infinite": ("batch_size: .inf\n", "batch_size: expected a whole number, found inf"),
    "a mapping": ("dtype: {a: 1}\n", "dtype: expected one of bf16, fp16, fp32, found {'a': 1}"),
    "null": ("seed: null\n", "seed: expected a value, found null; give one or leave the key out"),
    "yes": ("chat: maybe\n", "chat: expected true or false, found maybe"),
    "JSON is YAML": ('{"seed": -3}', "seed: expected 0 or more, found -3"),
    "deep": ("[" * 5000, "expected YAML, found a fault ("),
}  # fmt: skip
for name, (text, message) in YAML.items():
    make = yaml(text)
    make.__name__ = f"yaml: {name}"
    case(message)(make)


@case.table
def test_one_clear_line(name, run_cli, flags, tmp_path, llama_dir):
    case.check(name, run_cli, flags, tmp_path, llama_dir)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_setting_keeps_its_bounds_in_every_command(command):
    """A command may give a shared setting another default, not another type."""
    shared = {field.name: list(bounds_of(field.type)) for field in fields(Settings)}
    assert sum(map(len, shared.values())) > 10
    for field in fields(COMMANDS[command].settings):
        if field.name in shared:
            assert list(bounds_of(field.type)) == shared[field.name], field.name


def test_a_bound_is_one_line_with_the_way_out():
    for changes, line in (
        (
            {"batch_size": 0},
            "batch_size: expected 1 or more, found 0; set --batch_size to 1 or more",
        ),
        ({"checkpoint_every": math.nan}, "checkpoint_every: expected 0 or more, found nan; set "),
        ({"dtype": None}, "dtype: expected a value, found null; give one or leave the key out"),
        (
            {"dtype": "fp23"},
            "unknown dtype 'fp23'; did you mean 'fp32'? Expected one of: bf16, ",
        ),
        ({"n_options": (1, 4)}, "n_options: expected numbers from 2 to 26, found [1, 4]; set for"),
    ):
        with pytest.raises(InputError, match=re.escape(line)):
            check_values(Settings, changes)
    check_values(Settings, {"template": None, "shard": None, "max_batch_tokens": "auto"})


def test_many_aliases_are_not_unfolded(tmp_path):
    """Nine lists of nine of the one before: a billion words where they are written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path = raw(tmp_path, "\n".join(lines).encode(), "run.yaml")
    with pytest.raises(InputError, match="unknown setting 'a0'"):
        parse(["collect", "--config", str(path)])


def test_an_error_is_one_printable_line_of_bearable_length():
    error = str(InputError(f"a\n\x1b[31m\u202eb \ud800 é 🧪 {'x' * 5000} do this"))
    assert error.startswith("a \\x1b[31m\\u202eb \\ud800 é 🧪 xxx")
    assert error.endswith("xxx do this")
    assert error.isprintable()
    assert len(error) < 1300


def test_what_can_be_read_stays():
    assert printable("‖z_h W_O‖ · café مرحبا 漢字 'x'") == "‖z_h W_O‖ · café مرحبا 漢字 'x'"
