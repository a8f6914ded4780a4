"""The tree itself: short files, functions that fit a screen, and imports that run downwards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("spark_fast", "pipelines", "tools", "benchmarks", "docs")
FILES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if ROOT / "spark_fast" / "pipelines" not in path.parents
)

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def imported(path):
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def below(names, *packages):
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in packages))


def test_there_is_something_to_look_at():
    assert len(FILES) > 30
    assert below(imported(ROOT / "spark_fast" / "cli" / "pretrain.py"), "spark_fast.training", "spark_fast.pipelines")


@every_file
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


@every_file
def test_a_function_fits_a_screen(path):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(ast.parse(path.read_text()))}
    assert not {name: lines for name, lines in long.items() if lines > 60}


@every_file
def test_a_file_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body


def test_nothing_is_called_utils():
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not parts & {"utils", "util", "helpers", "misc", "common"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pipelines", ["spark_fast.training", "spark_fast.spark", "spark_fast.encoder", "tools", "benchmarks"]),
        ("spark_fast/encoder", ["spark_fast.training", "spark_fast.spark", "spark_fast.decoder", "spark_fast.train",
                                "spark_fast.weights", "spark_fast.pipelines", "tools"]),
        ("spark_fast", ["tools", "benchmarks", "tests"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_imports_run_downwards(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        assert not below(imported(path), *forbidden), path


@pytest.mark.parametrize("name", ["spark", "decoder", "masking", "weights/spark_keys"])
def test_the_mathematics_knows_no_trainer_and_no_data(name):
    found = below(
        imported(ROOT / "spark_fast" / f"{name}.py"), "spark_fast.training", "spark_fast.train", "spark_fast.pipelines"
    )
    assert not found
