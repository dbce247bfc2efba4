"""README and docs: their commands are commands, their Python runs, their links lead somewhere."""

import re
import shlex

import pytest
from conftest import ROOT

from tl_headnorm import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
PROGRAM = re.compile(r"^(python -m tl_headnorm|tl-headnorm) ")


def blocks(kind):
    """(page, body) of every fenced block of a kind."""
    return [
        (page, body)
        for page, text in TEXTS.items()
        for found, body in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)
        if found == kind
    ]


def commands():
    lines = (
        (page, line.partition(" #")[0].strip())
        for page, body in blocks("bash")
        for line in body.replace("\\\n", " ").splitlines()
    )
    return [(page, line) for page, line in lines if PROGRAM.match(line)]


def python(marker):
    """The one Python block that contains `marker`."""
    (found,) = [body for _, body in blocks("python") if marker in body]
    return found


def test_every_command_is_documented():
    listed = set(re.findall(r"^\| `([a-z]+)` \|", TEXTS["README.md"], flags=re.MULTILINE))
    assert set(cli.COMMANDS) <= listed
    shown = {shlex.split(PROGRAM.sub("", line))[0] for _, line in commands()}
    assert {"collect", "validate", "ablate", "attribute", "steer", "inactive"} <= shown


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_understood(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(PROGRAM.sub("", command))
    # Resuming reads the run's own settings: there is no such run here.
    if "--resume" in arguments:
        with pytest.raises(cli.InputError, match="resume: expected a run directory"):
            cli.parse(arguments)
        return
    name, settings = cli.parse(arguments)
    assert name == arguments[0]
    assert settings is not None


def test_an_unknown_flag_in_the_docs_would_be_noticed():
    with pytest.raises(cli.InputError):
        cli.parse(["collect", "--max_sample", "3"])


@pytest.mark.parametrize("marker", ["load_run", "strongest = "])
def test_python_runs(marker, monkeypatch):
    import plotly.graph_objects as go

    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda self: shown.append(self))
    names = {}
    exec(compile(python(marker), marker, "exec"), names)
    assert len(shown) == (marker == "load_run")
    assert names["run"].sizes["head"] == 8


def test_a_registered_template_is_used():
    from tl_headnorm.data.templates import TEMPLATES, get_template

    exec(compile(python("@register_template"), "own_data", "exec"), {})
    try:
        assert get_template("short").name == "short"
    finally:
        TEMPLATES.pop("short")


def test_the_measure_of_the_readers_own_runs(tmp_path):
    from tl_headnorm import collect, load_model, load_questions

    (tmp_path / "mine.py").write_text(python("MEASURES = "))
    model = load_model("builtin:tiny", dtype="fp32")
    questions = load_questions("builtin:questions", max_samples=3)
    run = collect(
        model, questions, measures="largest", measures_file=str(tmp_path / "mine.py"),
        progress=False,
    )  # fmt: skip
    assert run["largest"].shape == (3, 4, 8)
    assert (run["largest"].values > 0).all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].encode()) <= 7000


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_no_placeholder_is_left(page):
    assert "<!--" not in TEXTS[page]
    assert "@@" not in TEXTS[page]
