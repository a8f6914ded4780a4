"""The tree itself: short files, functions that fit a screen, rooms with few arrows between them, imports downwards."""

import ast
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("spark_fast", "pipelines", "tools", "benchmarks")
LINK = ROOT / "spark_fast" / "pipelines"  # to pipelines/
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if LINK not in p.parents)
# the rooms and files of the product, from the ground up: each imports from its own floor and those below
FLOORS = [
    [
        "errors",
        "files",
        "commands",
        "autograd",
        "versions",
        "streams",
        "operating_system",
        "exchange",
        "evaluation_mode",
    ],
    ["pipelines"],
    ["masking"],
    ["encoder"],
    ["networks", "decoder"],
    ["method"],
    ["spark", "fcmae"],
    ["checkpoint"],
    ["weights"],
    ["reporting"],
    ["run"],
    ["training"],
    ["evaluation"],
    ["cli"],
    ["train", "evaluate"],
]
MOST_ARROWS = 25  # between the files and folders of one folder
GROUND = {*FLOORS[0]}  # files that anything may stand on
MOST_UNTYPED = 19  # uses of Any in the product, and comments that silence the type checker
MOST_ARROWS_BETWEEN_ROOMS = 48  # of spark_fast itself: its rooms and the files of the method, without the ground

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("spark_fast", *parts) if parts[0] == "pipelines" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


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
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module)
    return names


GRAPH = {name: (imported(path) & set(MODULES)) - {name} for name, path in MODULES.items()}
GRAPH["spark_fast"] = set()  # its public names are loaded when they are first used


def below(names, *packages):
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in packages))


def arrows():
    """folder -> the pairs of its direct children of which one imports the other; a package's __init__ is none."""
    found = defaultdict(set)
    for name, others in GRAPH.items():
        for other in others:
            ours, theirs = name.split("."), other.split(".")
            level = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if level:
                found[".".join(ours[:level])].add((ours[level], theirs[level]))
    return found


def test_there_is_something_to_look_at():
    assert len(FILES) > 100
    assert below(GRAPH["spark_fast.cli.train"], "spark_fast.training")
    assert below(GRAPH["spark_fast.pipelines.build"], "spark_fast.pipelines.sources")
    assert ("training", "run") in arrows()["spark_fast"]


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


def test_no_two_files_of_the_product_have_one_name():
    commands = {ROOT / "spark_fast" / "train.py", ROOT / "spark_fast" / "evaluate.py"}  # for torchrun -m
    product = [p for p in FILES if p.relative_to(ROOT).parts[0] in ("spark_fast", "pipelines")]
    names = Counter(p.name for p in product if p.name != "__init__.py" and p not in commands)
    assert not [name for name, count in names.items() if count > 1]


def test_few_places_of_the_product_escape_the_type_checker():
    sources = [path.read_text() for path in FILES if path.relative_to(ROOT).parts[0] in ("spark_fast", "pipelines")]
    names = [node.id for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    assert names.count("Any") <= MOST_UNTYPED
    assert sum(source.count("# type: ignore") for source in sources) <= MOST_UNTYPED


def test_every_room_stands_on_a_floor_and_imports_downwards():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for name, others in GRAPH.items():
        root, _, inner = name.partition(".")
        if root != "spark_fast" or not inner:
            continue
        room = inner.split(".")[0]
        assert room in floor, f"{name}: on which floor does it stand?"
        for other in others - {"spark_fast"}:
            assert other.startswith("spark_fast."), f"{name} imports {other}"
            assert floor[other.split(".")[1]] <= floor[room], f"{name} imports upwards: {other}"


def test_no_folder_is_a_tangle():
    found = arrows()
    assert len([pair for pair in found.pop("spark_fast") if not GROUND & set(pair)]) <= MOST_ARROWS_BETWEEN_ROOMS
    counts = {folder: len(pairs) for folder, pairs in found.items()}
    assert {folder: count for folder, count in counts.items() if count > MOST_ARROWS} == {}


def test_imports_run_in_no_circle():
    tuple(TopologicalSorter(GRAPH).static_order())  # raises CycleError with the circle


def test_the_mathematics_knows_no_trainer_and_no_data():
    for name in ("spark", "fcmae", "method", "decoder", "masking", "networks", "encoder"):
        reached, todo = set(), [n for n in GRAPH if n == f"spark_fast.{name}" or n.startswith(f"spark_fast.{name}.")]
        while todo:
            reached |= (new := GRAPH[todo.pop()] - reached)
            todo += new
        assert not below(reached, "spark_fast.pipelines", "spark_fast.run", "spark_fast.training"), name


@every_file
def test_text_files_are_utf_8_in_every_locale(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {word.arg: word.value for word in node.keywords}
        if called in ("read_text", "write_text"):
            assert "encoding" in words, f"{path}:{node.lineno}"
        elif called == "open" and _mode_of(node, words) is not None:
            assert "b" in _mode_of(node, words) or "encoding" in words, f"{path}:{node.lineno}"


def _mode_of(call, words):
    """The mode of Path.open(...) or of the function; None where `open` is of something else than a path."""
    of_a_path = isinstance(call.func, ast.Attribute)
    if (
        of_a_path
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("os", "Image", "tarfile", "io", "webbrowser")
    ):
        return None
    given = call.args[0 if of_a_path else 1 :]
    mode = words.get("mode", given[0] if given else None)
    if mode is None:
        return "r" if not (of_a_path and call.args) else None
    return (
        mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and len(mode.value) <= 3 else None
    )
