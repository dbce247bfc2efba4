"""The import contracts of pyproject.toml hold, and each of them can fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LINT = Path(sys.executable).with_name("lint-imports")


def broken(root):
    """Names of the contracts that do not hold for the package below a folder, and the output."""
    done = subprocess.run(
        [LINT, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=120
    )
    found = re.findall(r"^(.*) BROKEN", done.stdout, re.MULTILINE)
    assert (done.returncode == 0) == (not found), done.stdout + done.stderr
    return found, done.stdout


@pytest.fixture
def copy(tmp_path):
    """The package's Python files and its contracts, to be changed."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in (ROOT / "tl_headnorm").rglob("*.py"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def test_the_contracts_hold():
    found, text = broken(ROOT)
    assert not found, text


DIRECTION = "Imports point down"
COMMANDS = "Commands import no other command but collect"
ORACLE = "The oracle shares no code with what it checks"
LENS = "Only engine imports transformer_lens"


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("stats", "from tl_headnorm.settings import Settings", DIRECTION),
        ("engine/memory", "def f():\n    from tl_headnorm import model", DIRECTION),
        ("data/tokens", "from ..cli import main", DIRECTION),
        ("run/files", "import tl_headnorm.commands.collect.collect as c", DIRECTION),
        ("placeless", "import tl_headnorm.stats", DIRECTION),
        ("commands/steer/steer", "from tl_headnorm.commands.massive import massive", COMMANDS),
        ("commands/steer/steer", "from ..massive.massive import x", COMMANDS),
        ("commands/collect/collect", "from tl_headnorm.commands.merge import merging", COMMANDS),
        ("oracle/hugging_face", "from tl_headnorm.measures import MEASURES", ORACLE),
        ("oracle/hugging_face", "def f():\n    from tl_headnorm.engine import memory", ORACLE),
        ("interventions/edits", "from transformer_lens import utils", LENS),
    ],
)
def test_each_can_fail(module, line, contract, copy):
    path = copy / "tl_headnorm" / f"{module}.py"
    path.write_text((path.read_text() if path.exists() else '"""New."""') + f"\n{line}\n")
    assert contract in broken(copy)[0]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("commands/steer/steer", "from tl_headnorm.commands.collect import collect"),
        (
            "stats",
            "import typing\nif typing.TYPE_CHECKING:\n    import tl_headnorm.cli",
        ),
        ("engine/memory", "import transformer_lens"),
        ("oracle/hugging_face", "from tl_headnorm.run import files"),
    ],
)
def test_what_points_down_passes(module, line, copy):
    path = copy / "tl_headnorm" / f"{module}.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert not broken(copy)[0]


def test_a_new_command_needs_no_contract_of_its_own(copy):
    folder = copy / "tl_headnorm" / "commands" / "novel"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "command.py").write_text("from tl_headnorm.commands.collect import collect\n")
    assert not broken(copy)[0]
    (folder / "command.py").write_text("from tl_headnorm.commands.steer import steer\n")
    assert broken(copy)[0] == [COMMANDS]


def test_exceptions_are_still_needed(copy):
    """An exception that nobody needs any more must go."""
    path = copy / "tl_headnorm" / "commands" / "bench" / "studies.py"
    source = path.read_text()
    path.write_text(re.sub(r"^from tl_headnorm\.commands\.attribute.*\n", "", source, flags=re.M))
    done = subprocess.run([LINT, "--no-cache"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bench.studies" in done.stdout + done.stderr
