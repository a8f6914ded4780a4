"""A public function that takes or returns tensors tells their shapes, itself or by its class."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = ROOT / "spark_fast" / "pipelines"  # to pipelines/
FILES = sorted(
    p for package in ("spark_fast", "pipelines") for p in (ROOT / package).rglob("*.py") if LINK not in p.parents
)
TENSOR = re.compile(r"\b(Tensor|NDArray)\b")
# The name of an axis is a letter or two (B, C_i, h', ky), a number (2H), or one of these words.
WORDS = (
    "bytes channels cin classes count cout experts groups guesses height keep longest masks num_samples out paths "
    "places reach samples side size size_x size_y steps stride threads width"
)
NAME = rf"(?:\d*[A-Za-z]{{1,2}}(?:_[a-z])?'?|\d+|{'|'.join(WORDS.split())})"
AXIS = rf"(?:\.\.\.|\*\w+|{NAME}(?: ?[-+*/^] ?{NAME})*)"
SHAPE = re.compile(rf"(?<!\w)\({AXIS}(?:,|(?:, {AXIS})+)\)|\bscalars?\b|\bof any shape\b", re.IGNORECASE)
SAID_BY_THE_CLASS = {"__init__", "__call__", "forward"}  # what a class is made with, and what its objects compute


def tells_a_shape(text):
    return SHAPE.search(" ".join((text or "").split())) is not None


def tensor_functions(tree):
    """(name, what is said of it) of the public functions with a tensor in an annotation."""

    def inside(node, prefix, of_class):
        for child in node.body:
            if isinstance(child, (ast.If, ast.Try)):
                yield from inside(child, prefix, of_class)
            elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from inside(child, f"{prefix}{child.name}.", ast.get_docstring(child) or "")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and TENSOR.search(annotations(child)):
                said = ast.get_docstring(child) or ""
                if child.name in SAID_BY_THE_CLASS:
                    yield f"{prefix}{child.name}", f"{said} {of_class}"
                elif not child.name.startswith("_"):
                    yield f"{prefix}{child.name}", said

    return list(inside(tree, "", ""))


def annotations(function):
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    said = [a.annotation for a in arguments if a is not None and a.annotation is not None]
    return " ".join(ast.unparse(a) for a in [*said, *([function.returns] if function.returns else [])])


def silent(source):
    return [name for name, said in tensor_functions(ast.parse(source)) if not tells_a_shape(said)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_of_tensors_tell_their_shapes(path):
    assert not silent(path.read_text()), "say which shapes they take and return"


def test_there_are_functions_of_tensors():
    assert sum(len(tensor_functions(ast.parse(path.read_text()))) for path in FILES) > 250


@pytest.mark.parametrize(
    "text",
    [
        *("(B, C, H, W)", "(n,)", "(V, C', b/stride, b/stride)", "(B*K, C_i, 2h, 2w)", "(..., C)", "(*size, 3)"),
        *("(V, 2*reach+1,\n    2*reach+1)", "a scalar", "Of any shape.", "tensors of any\n    shape"),
    ],
)
def test_what_tells_a_shape(text):
    assert tells_a_shape(f"Pixels, {text} on the device.")


@pytest.mark.parametrize(
    "text",
    [
        "Pixels.",
        "f(x, y)",
        "(see there, too)",
        "(size, crc)",
        "(step, batch) -> loss",
        "(B)",
        "()",
        "any shape but this",
    ],
)
def test_what_tells_none(text):
    assert not tells_a_shape(text)


def test_the_class_speaks_for_what_its_objects_compute_and_for_nothing_else():
    source = '''
class Layer:
    """(B, C) -> (B, D)."""
    def forward(self, x: Tensor) -> Tensor: ...
    def weight(self) -> Tensor: ...
    def _hidden(self, x: Tensor) -> Tensor: ...
    def name(self) -> str: ...
def alone(x: NDArray[np.uint8] | None) -> None:
    """Uses it."""
'''
    assert silent(source) == ["Layer.weight", "alone"]
