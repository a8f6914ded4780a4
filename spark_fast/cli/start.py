"""Where every command starts: `spark-fast-NAME`, `python -m spark_fast.train` and the scripts in tools/.

`--version` is answered before the module of the command is imported, and torch with it, which takes seconds.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from io import TextIOWrapper

from spark_fast.errors import CTRL_C
from spark_fast.versions import __version__


def start(name: str, argv: list[str] | None = None) -> int:
    """Run the command spark-fast-`name` on these words, else on those of the command line; returns the exit code."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: any text can be printed in any locale
    words = sys.argv[1:] if argv is None else argv
    if "--version" in words:
        print(f"spark-fast-{name} {__version__}")
        return 0
    try:
        module = import_module(f"spark_fast.cli.{name}")
    except KeyboardInterrupt:
        print(f"spark-fast-{name}: interrupted", file=sys.stderr)
        return CTRL_C
    return module.main(words)


train = partial(start, "train")
evaluate = partial(start, "eval")
convert = partial(start, "convert")
export = partial(start, "export")
reconstruct = partial(start, "reconstruct")
plot = partial(start, "plot")
doctor = partial(start, "doctor")
