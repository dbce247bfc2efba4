"""Every notebook runs from top to bottom on the built-in model, and is stored without outputs."""

import json

import pytest
import yaml
from conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name, kind):
    """The cells of a kind, as stored."""
    stored = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return [cell for cell in stored["cells"] if cell["cell_type"] == kind]


def test_they_are_all_there():
    assert [name[:3] for name in NOTEBOOKS] == [f"{i:02d}_" for i in range(1, 7)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_is_stored(name):
    for cell in cells(name, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert set(cell["metadata"]) == set()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_says_what_its_numbers_cannot_tell(name):
    text = "".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    assert text.startswith("# " + name[:2])
    assert "cannot" in text


# jupyter_client warns of what its own defaults do: kernels talk over the loopback interface.
@pytest.mark.filterwarnings("default::Warning:jupyter_client")
@pytest.mark.filterwarnings("default::Warning:zmq")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    said = "".join(out.text for out in outputs if out.get("name") == "stderr")
    assert "Warning" not in said, said
    # Figures show themselves; so does a run, where it stands alone.
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds or name.startswith("02")
    if any(cell["source"][-1] == "run" for cell in cells(name, "code")):
        forms = "".join(out.get("data", {}).get("text/html", "") for out in outputs)
        assert "class=tlh" in forms


def test_an_error_in_a_notebook_would_be_noticed(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": tmp_path}})
    with pytest.raises(CellExecutionError, match="assert 1 == 2"):
        client.execute()


def test_citation():
    """The keys that the Citation File Format 1.2.0 requires, and this version."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert set(found) >= {"cff-version", "message", "title", "authors"}
    assert found["cff-version"] == "1.2.0"
    assert f'version = "{found["version"]}"' in project
    assert [set(author) for author in found["authors"]] == [{"name"}]
    assert "doi" not in found


def test_changelog_names_every_command():
    from tl_headnorm.commands.table import COMMANDS

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n")
    missing = [name for name in COMMANDS if f"`{name}`" not in text]
    assert not missing
