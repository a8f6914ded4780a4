"""Run the commands of docs/tutorials/first_run.md and draw its two pictures.

    python docs/generate/draw_first_run.py --work /tmp/first_run

A run that is there already is resumed, and only the pictures are drawn anew. Less than half an hour on two cores.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorials" / "first_run.md"
PICTURES = {name: PAGE.parents[1] / "pictures" / f"first_run_{name}" for name in ("grid.png", "curves.png")}


def commands() -> list[list[str]]:
    """The words of the page's commands, without the installation."""
    shown = "".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    lines = shown.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("pip ")]


def started(words: list[str]) -> list[str]:
    """A command of the page as this checkout starts it."""
    if words[0] == "python":
        return [sys.executable, str(ROOT / words[1]), *words[2:]]
    name = words[0].removeprefix("spark-fast-")
    again = {"train": ["--resume=auto"], "reconstruct": ["--overwrite"]}.get(name, [])
    return [sys.executable, "-m", f"spark_fast.cli.{name}", *words[1:], *again]


def draw_first_run(work: Path = Path("first_run")) -> int:
    """Run the tutorial.

    Args:
        work: The folder of its images and its run.
    """
    work.mkdir(exist_ok=True)
    for words in commands():
        if words[0] != "spark-fast-export":  # refuses what is there, and draws nothing
            subprocess.run(started(words), cwd=work, check=True)
    for name, picture in PICTURES.items():
        shutil.copy(work / name, picture)
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(draw_first_run, use_underscores=True, description=__doc__))
