"""A message names the command that the user has."""

import shutil
import sys

import pytest

from spark_fast import commands
from spark_fast.commands import SCRIPTS, command


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))


def test_the_installed_command_is_named_where_it_is_on_the_path(nothing_installed, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert command("convert") == "spark-fast-convert"


def test_the_installed_command_is_named_where_it_lies_beside_python(nothing_installed, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "spark-fast-plot").touch()
    assert command("plot") == "spark-fast-plot"


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_a_checkout_its_script_is_named_and_exists(nothing_installed, name):
    assert command(name) == f"python tools/{SCRIPTS[name]}"
    assert (commands.TOOLS / SCRIPTS[name]).is_file()


def test_elsewhere_the_module_is_named(nothing_installed, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "TOOLS", tmp_path)
    assert command("convert") == "python -m spark_fast.cli.convert"
