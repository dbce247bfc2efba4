"""Tables of what a newcomer will do: each is one clear line, exit code 2, and nothing written."""

import json
import shutil

import pytest
from conftest import write_jsonl


class Cases(dict):
    """Name -> (a function of its folder and the model's that returns the flags, messages)."""

    def __call__(self, *messages):
        def add(function):
            assert function.__name__ not in self
            self[function.__name__] = (function, messages)
            return function

        return add

    @property
    def table(self):
        """For the test that runs them all."""
        return pytest.mark.parametrize("name", self)

    def check(self, name, run_cli, flags, folder, model):
        """Run a case. `command` among its flags is the command, else collect."""
        make, messages = self[name]
        changes = dict(make(folder, model))
        command = changes.pop("command", "collect")
        result = run_cli(command, *flags(changes))
        assert (result.code, result.out) == (2, "")
        line = last_line(result)
        for message in messages:
            assert message in line
        assert len(line) < 600
        assert line.isprintable()
        assert "site-packages" not in line
        assert " object at 0x" not in line
        assert not any((folder / "runs").glob("*"))


def last_line(result):
    """The error line; a bar may have been up when it was found."""
    lines = result.err.replace("\r", "\n").splitlines()
    result.err = "\n".join(x for x in lines if x and "|" not in x.split("[")[0])
    return result.error_line


def questions(folder, *records):
    return write_jsonl(folder / "questions.jsonl", records)


def raw(folder, data, name="questions.jsonl"):
    """A file of these bytes."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def copy_of(model, folder):
    shutil.copytree(model, folder / "model")
    return folder / "model"


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def merged_flags(small, folder, changes):
    """The flags of a small run with some replaced; None takes one away."""
    pairs = dict(zip(small[::2], small[1::2], strict=True))
    pairs["--output_dir"] = folder / "runs"
    pairs.update({f"--{name}": value for name, value in changes.items()})
    return [x for pair in pairs.items() if pair[1] is not None for x in pair]
