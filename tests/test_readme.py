"""The README's commands are commands, its Python runs."""

import re
import shlex

import pytest
from conftest import ROOT

from tl_headnorm import cli

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
SHELL = "\n".join(body for kind, body in BLOCKS if kind == "bash").replace("\\\n", " ")
PROGRAM = re.compile(r"^(python -m tl_headnorm|tl-headnorm) ")
COMMANDS = [line.partition(" #")[0].strip() for line in SHELL.splitlines() if PROGRAM.match(line)]


def test_there_are_commands_of_every_kind():
    named = {
        shlex.split(re.sub(r"^python -m tl_headnorm|^tl-headnorm", "", c))[0] for c in COMMANDS
    }
    assert {"collect", "validate", "ablate", "attribute"} <= named
    listed = set(re.findall(r"^\| `([a-z]+)` \|", TEXT, flags=re.MULTILINE))
    assert set(cli.COMMANDS) <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(PROGRAM.sub("", command))
    name, settings = cli.parse(arguments)
    assert name == arguments[0]
    assert settings is not None


def test_an_unknown_flag_in_the_readme_would_be_noticed():
    with pytest.raises(cli.InputError):
        cli.parse(["collect", "--max_sample", "3"])


def test_the_notebook_lines_run(monkeypatch):
    import plotly.graph_objects as go

    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda self: shown.append(self))
    code = next(body for kind, body in BLOCKS if kind == "python" and "load_model" in body)
    exec(compile(code, "README.md", "exec"), {})
    assert len(shown) == 1


def test_the_measure_of_the_readers_own_runs(tmp_path):
    from tl_headnorm import collect, load_model, load_questions

    code = next(body for kind, body in BLOCKS if kind == "python" and "MEASURES = " in body)
    (tmp_path / "mine.py").write_text(code)
    model = load_model("builtin:tiny", dtype="fp32")
    questions = load_questions("builtin:questions", max_samples=3)
    run = collect(
        model, questions, measures="largest", measures_file=str(tmp_path / "mine.py"),
        progress=False,
    )  # fmt: skip
    assert run["largest"].shape == (3, 4, 8)
    assert (run["largest"].values > 0).all()


def test_no_placeholder_is_left():
    assert "<!--" not in TEXT
    assert "@@" not in TEXT
