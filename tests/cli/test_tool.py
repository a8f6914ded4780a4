"""What the tools share: messages, exit codes, and an output that nobody reads to its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from spark_fast.cli.tool import run_tool
from spark_fast.errors import CheckpointError, DataError, SettingsError, StorageError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SettingsError("no such size"), 2, "no such size"),
        (DataError("no image"), 3, "no image"),
        (StorageError("the disk is full"), 6, "the disk is full"),
        (CheckpointError("is damaged"), 6, "is damaged"),
        (OSError(28, "No space left on device"), 6, "No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), 6, "Broken pipe"),  # between processes: the output is still read
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_a_failure_has_its_message_and_exit_code(capsys, error, code, message):
    def tool() -> int:
        raise error

    assert run_tool("plot", tool, []) == code
    said = capsys.readouterr().err
    assert said.startswith("spark-fast-plot: ")
    assert message in said
    assert said.count("\n") == 1


def test_the_exit_code_is_that_of_the_tool():
    assert run_tool("doctor", lambda: 1, []) == 1


@pytest.mark.parametrize(
    ("called", "usage", "example"),
    [
        ("/usr/bin/spark-fast-plot", "usage: spark-fast-plot [-h]", "spark-fast-plot output_my_run"),
        ("tools/plot_run.py", "usage: plot_run.py [-h]", "python tools/plot_run.py output_my_run"),
        ("/lib/spark_fast/cli/plot.py", "usage: spark-fast-plot [-h]", "spark-fast-plot output_my_run"),
    ],
)
def test_the_usage_shows_the_command_as_it_was_called(monkeypatch, capsys, called, usage, example):
    from spark_fast.cli.plot import main

    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith(usage)
    assert example in said


def lines_read(script, count, tmp_path):
    """(exit code, standard error) of a Python script whose reader closes its output after so many lines."""
    (tmp_path / "script.py").write_text(script)
    words = [sys.executable, str(tmp_path / "script.py")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(count):
        process.stdout.readline()
    process.stdout.close()
    return process.wait(timeout=60), process.stderr.read()


SCRIPT = """
import sys
from spark_fast.cli.tool import run_tool
from spark_fast.errors import StorageError

def tool() -> int:
    \"\"\"Print.\"\"\"
    {body}
    return 0

sys.exit(run_tool("plot", tool, {words}))
"""


@pytest.mark.parametrize(
    "body",
    [
        "for i in range(100_000): print(i)",
        "import time; print(1, flush=True); time.sleep(1); print(2)",  # what is left in the buffer at the end
        """
    try:
        for i in range(100_000): print(i)
    except OSError as error:
        raise StorageError("writing failed") from error""",
    ],
    ids=["print", "flush", "wrapped"],
)
def test_when_nobody_reads_on_the_tool_ends_in_silence(tmp_path, body):
    assert lines_read(SCRIPT.format(body=body, words=[]), 1, tmp_path) == (141, "")
