"""How convert, export, reconstruct, plot and doctor run: a function each, called by its command line.

Nothing heavy is imported here: the doctor must speak where torch does not load.
"""

from __future__ import annotations

import inspect
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from spark_fast.commands import SCRIPTS
from spark_fast.errors import CTRL_C, SparkFastError, StorageError

READER_GONE = 128 + signal.SIGPIPE  # exit code, as a shell has it for a process that the signal ended


def run_tool(
    name: str, tool: Callable[..., int], argv: list[str] | None = None, interrupted: str = "interrupted"
) -> int:
    """Call `tool` with what tyro reads from the command line by its signature; returns the exit code.

    Args:
        name: The command is spark-fast-`name`.
        tool: Its docstring describes the flags, that of its module the command.
        argv: The words of the command line; those of this process by default.
        interrupted: What is said after Ctrl-C.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    installed, script = f"spark-fast-{name}", Path(sys.argv[0])
    prog, typed = (script.name, f"python {script}") if script.name == SCRIPTS[name] else (installed, installed)
    about = (inspect.getdoc(inspect.getmodule(tool)) or "").replace(installed, typed)
    try:
        try:
            return tyro.cli(tool, args=argv, use_underscores=True, prog=prog, description=about)
        except KeyboardInterrupt:
            return _complain(prog, interrupted, CTRL_C)
        except (SparkFastError, OSError) as error:
            if _reader_gone(error):
                return _silenced()
            return _complain(prog, error, getattr(error, "exit_code", StorageError.exit_code))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # by flush
        return _silenced()


def _complain(prog: str, error: object, code: int) -> int:
    print(f"{prog}: {error}", file=sys.stderr, flush=True)
    return code


def _reader_gone(error: Exception) -> bool:
    """Whether this is because nobody reads the output any more (`| head`), and not a pipe between processes."""
    if not isinstance(error if isinstance(error, OSError) else error.__cause__, BrokenPipeError):
        return False
    output = select.poll()
    for number in (1, 2):
        output.register(number, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _silenced() -> int:
    """End without a word, like every program whose reader has gone: what is still buffered goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    return READER_GONE
