"""Each command says its version at once, however it is started."""

import subprocess
import sys
from pathlib import Path

import pytest

import spark_fast
from spark_fast.cli import start
from spark_fast.commands import SCRIPTS
from spark_fast.run.config import tomllib

ROOT = Path(__file__).parents[2]
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_every_command_has_an_entry_point():
    names = ("train", "eval", "convert", "export", "reconstruct", "plot", "doctor")
    assert list(ENTRY_POINTS) == [f"spark-fast-{name}" for name in names]


@pytest.mark.parametrize("installed", ENTRY_POINTS)
def test_an_entry_point_starts_its_own_command(installed, capsys):
    module, _, function = ENTRY_POINTS[installed].partition(":")
    assert module == start.__name__
    assert getattr(start, function)(["--version"]) == 0
    assert capsys.readouterr().out == f"{installed} {spark_fast.__version__}\n"


def test_the_version_is_said_without_importing_torch():
    script = "import sys; from spark_fast.train import main; main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"spark-fast-train {spark_fast.__version__}\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", ["-m", "spark_fast.train"]),
        ("eval", ["-m", "spark_fast.evaluate"]),
        ("doctor", ["-m", "spark_fast.cli.doctor"]),
        *((name, [f"tools/{script}"]) for name, script in SCRIPTS.items()),
    ],
)
def test_a_script_or_module_is_the_same_command(name, words):
    done = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"spark-fast-{name} {spark_fast.__version__}\n"), done.stderr


def test_ctrl_c_while_torch_is_being_imported_is_no_traceback(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "import_module", interrupted)
    assert start.train(["my_run"]) == 130
    assert capsys.readouterr().err == "spark-fast-train: interrupted\n"
