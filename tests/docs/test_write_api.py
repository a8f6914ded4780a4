"""docs/reference/api.md is what the code says."""

import re

import pytest

import spark_fast
from docs.generate import write_api

NAMES = [name for names in write_api.NAMES.values() for name in names]


def test_the_page_is_up_to_date():
    assert write_api.PAGE.read_text() == write_api.page(), "run docs/generate/write_api.py"


def test_every_public_name_is_there_once():
    public = {f"spark_fast.{name}" for name in spark_fast.__all__} - {"spark_fast.__version__"}
    assert public - {"spark_fast.SparK", "spark_fast.FCMAE"} <= set(NAMES)  # made by their builders
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_a_docstring_explains_are_those_of_the_signature(name):
    head, _, text = write_api.entry(name).partition("\n```\n\n")
    section = text.partition("*Args*")[2].partition("\n\n*")[0]
    for said in re.findall(r"^- `([\w, ]+)`: ", section, re.MULTILINE):
        for argument in said.split(", "):
            assert re.search(rf"\b{argument}: ", head), argument


def test_a_signature_is_broken_where_it_is_long():
    def short(a: "int", b: "str" = "") -> "None":
        pass

    assert write_api.signature("x.short", short) == "short(a: int, b: str = '') -> None"
    said = write_api.signature("spark_fast.build_spark", spark_fast.build_spark)
    assert said.startswith("build_spark(\n    model: str | nn.Module = 'resnet50',\n    *,\n    input_size: ")
    assert said.endswith("\n) -> SparK")
