"""The import direction, read from the source with `ast`: top from below only.

cli > jobs > studies, figures, bench > collecting > model, hf, data, results, ... > the rest
"""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "tl_headnorm"
# Highest first. Within a level modules may import each other, studies excepted. A new module
# must be given its place here.
LEVELS = (
    {"__main__", "__init__"},
    {"cli"},
    {"jobs", "demo"},
    {"studies", "figures", "bench", "agreement"},
    {"intervene", "collecting", "measuring", "runs"},
    {"model", "pretrained", "families", "bridge", "adapters", "selfcheck", "hooks", "hf"}
    | {"data", "results", "memory", "fast"},
    {"measures", "points", "stats", "commands", "config", "files", "errors", "shapes", "tiny"}
    | {"notebook"},
)
LEVEL = {name: height for height, level in enumerate(reversed(LEVELS)) for name in level}
# The oracle must not share the code under test. (Directly: it hands the run to `collecting`.)
FORBIDDEN = {("hf", "hooks"), ("hf", "measures")}
# Each with its reason; to be emptied.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("hf", "agreement"): "python -m tl_headnorm.hf --table hands over to it",
}


def modules(package=PACKAGE):
    """(dotted name below the package, path) of every module; tiny's scripts stand alone."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] != "tiny":
            yield ".".join(parts), path


def imported(source, name):
    """Dotted names below the package that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: counted from the module's own package
                parent = ["tl_headnorm", *name.split(".")][: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            # `from tl_headnorm import hooks` names a module by its alias.
            names = [f"{base}.{a.name}" if base == "tl_headnorm" else base for a in node.names]
            if base == "tl_headnorm.studies":
                names = [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        yield from (n.removeprefix("tl_headnorm.") for n in names if n.startswith("tl_headnorm."))


def typing_only(source):
    """The source without its `if TYPE_CHECKING:` blocks, which import nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def faults(name, source):
    """(importer, imported) pairs that go against the direction."""
    top = name.split(".")[0]
    for other in imported(typing_only(source), name):
        target = other.split(".")[0]
        # Two studies; the parts of one study in a package of its own are one study.
        siblings = top == target == "studies" and name.split(".")[:2] != other.split(".")[:2]
        siblings = siblings and "." in name
        crossed = siblings and other != name and other.count(".") and name != "studies.__init__"
        if target not in LEVEL or top not in LEVEL:
            if target != top:
                yield top, target  # a module without a place
        elif crossed or (top, target) in FORBIDDEN or LEVEL[target] > LEVEL[top]:
            yield (name, other) if crossed else (top, target)


def test_every_module_has_a_place():
    placeless = {name.split(".")[0] for name, _ in modules()} - set(LEVEL)
    assert not placeless, f"give a level in LEVELS to {placeless}"


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value))
def test_imports_point_down(name, path):
    found = [pair for pair in faults(name, path.read_text()) if pair not in EXCEPTIONS]
    assert not found, f"against the import direction: {found}"


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("measures", "from tl_headnorm.hooks import run_z", ("measures", "hooks")),
        ("measures", "from tl_headnorm import hooks", ("measures", "hooks")),
        ("measures", "import tl_headnorm.hooks as h", ("measures", "hooks")),
        ("data.tokens", "def f():\n    from tl_headnorm import cli", ("data", "cli")),
        ("data.tokens", "from ..collecting import measure_samples", ("data", "collecting")),
        ("model", "from .cli import main", ("model", "cli")),
        ("hf", "def f():\n    from tl_headnorm.hooks import W_O", ("hf", "hooks")),
        ("hf", "from tl_headnorm.measures import MEASURES", ("hf", "measures")),
        (
            "collecting",
            "from tl_headnorm.figures.heatmaps import heatmap",
            ("collecting", "figures"),
        ),
        (
            "studies.ablation",
            "from tl_headnorm.studies.massive import f",
            ("studies.ablation", "studies.massive"),
        ),
        (
            "studies.ablation",
            "from tl_headnorm.studies import massive",
            ("studies.ablation", "studies.massive"),
        ),
        ("studies.ablation", "from .massive import f", ("studies.ablation", "studies.massive")),
        ("studies.ablation", "from . import massive", ("studies.ablation", "studies.massive")),
        (
            "studies.attribution.engine",
            "from tl_headnorm.studies.massive import f",
            ("studies.attribution.engine", "studies.massive"),
        ),
        ("studies.ablation", "from tl_headnorm.jobs.opening import say", ("studies", "jobs")),
        ("measures", "import tl_headnorm.placeless", ("measures", "placeless")),
        ("placeless", "import tl_headnorm.measures", ("placeless", "measures")),
    ],
)
def test_the_checker_can_fail(name, source, fault):
    assert list(faults(name, source)) == [fault]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli", "from tl_headnorm.config.run import Settings"),
        ("collecting", "from tl_headnorm import hooks, results\nimport torch"),
        ("data.prepare", "from tl_headnorm.data.tokens import encode"),
        ("data.prepare", "from .tokens import encode"),
        ("studies.ablation", "from tl_headnorm.collecting import measure_samples"),
        ("studies.attribution.study", "from tl_headnorm.studies.attribution.engine import Engine"),
        (
            "config",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tl_headnorm.cli",
        ),
        ("measures", "from transformer_lens import hooks"),
    ],
)
def test_what_points_down_passes(name, source):
    assert list(faults(name, source)) == []


def test_exceptions_are_still_needed():
    """An exception nobody needs any more must go."""
    found = {pair for name, path in modules() for pair in faults(name, path.read_text())}
    assert set(EXCEPTIONS) <= found
