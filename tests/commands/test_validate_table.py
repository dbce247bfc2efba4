"""The documented table of families and engines is what the command writes."""

import re

import pytest
from conftest import ROOT

from tl_headnorm.commands.validate import agreement, command
from tl_headnorm.engine.families import has_hooked

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found():
    return agreement.measure()


def rows(text):
    """family -> cells of the columns hooked and bridge."""
    lines = re.findall(r"^\| (\w+) \| \w+ \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {family: cells for family, *cells in lines if family != "family"}


def test_every_family_agrees_on_every_engine(found):
    assert all(0 < value < TOLERANCE for row in found.values() for value in row.values())
    assert all("bridge" in row for row in found.values())
    if has_hooked():
        assert [family for family, row in found.items() if "hooked" not in row] == ["gemma2"]


def test_the_table_holds_what_was_found(found):
    cells = rows(agreement.table(found))
    assert set(cells) == set(found)
    for family, by_engine in found.items():
        for engine, cell in zip(agreement.ENGINES, cells[family], strict=True):
            expected = f"{by_engine[engine]:.1e}" if engine in by_engine else "–"
            assert cell == expected


@pytest.mark.skipif(not has_hooked(), reason="the documented table is that of transformer-lens 3.9")
def test_the_readme_shows_it(found):
    """Within an order of magnitude: the last digits are the processor's."""
    written = rows((ROOT / "docs/explanation/families.md").read_text(encoding="utf-8"))
    assert set(written) == set(found)
    for family, cells in written.items():
        for engine, cell in zip(agreement.ENGINES, cells, strict=True):
            assert (cell == "–") == (engine not in found[family])
            if cell != "–":
                assert float(cell) / 10 < found[family][engine] < float(cell) * 10


def test_the_command_prints_the_table(run_cli, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda: {"gemma2": {"bridge": 4.4e-7}})
    result = run_cli("validate", "--table")
    assert result.code == 0
    assert "| gemma2 | Gemma2ForCausalLM | – | 4.4e-07 |" in result.out
