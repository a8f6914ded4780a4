"""docs/reference/settings.md is what the settings say, commands.md what the commands do."""

import dataclasses
import re

import pytest
import tyro

from docs.generate import write_reference
from spark_fast.training.settings import Settings, parse


def test_the_page_is_up_to_date():
    assert write_reference.PAGE.read_text() == write_reference.reference(), "run docs/generate/write_reference.py"


@pytest.mark.parametrize("tree", write_reference.COMMANDS.values(), ids=write_reference.COMMANDS)
def test_every_setting_says_what_it_does(tree):
    for group in dataclasses.fields(tree()):
        rows = write_reference.rows(type(getattr(tree(), group.name)))
        assert rows
        assert all(what for _, _, what in rows)


def test_the_flags_it_names_are_those_of_the_command():
    settings = parse(["name", "--data_path=x", "--bs=8", "--ep=3", "--optimizer=adamw"])
    assert isinstance(settings, Settings)
    assert (settings.data.batch_size, settings.optim.epochs, settings.optim.optimizer) == (8, 3, "adamw")
    text = write_reference.reference()
    for row in ("`--batch_size`, `--bs`", "`--epochs`, `--ep`", "`--optimizer`, `--opt` (lamb, adamw, sgd) | `lamb`"):
        assert row in text


def test_the_page_of_the_commands_is_up_to_date():
    assert write_reference.TOOLS_PAGE.read_text() == write_reference.commands(), "run docs/generate/write_reference.py"


@pytest.mark.parametrize("name", write_reference.TOOLS)
def test_it_has_every_flag_of_a_command_and_no_other(name, capsys):
    tool = write_reference.TOOLS[name]
    with pytest.raises(SystemExit):
        tyro.cli(tool, args=["--help"], use_underscores=True)
    known = set(re.findall(r"(?m)^[^\w-]*(--\w+)", capsys.readouterr().out)) - {"--help"}
    rows = write_reference.tool_rows(tool)
    assert {flag for row in rows for flag in re.findall(r"`(--\w+)`", row[0])} == known
    assert all(what for _, _, what in rows)
