"""Convert on a Ray cluster: a task for each part, then the merge.

    python tools/convert_ray.py SRC DST --parts 8 [any flag of spark-fast-convert]

SRC and DST must be on a disk that all nodes see. A task that fails is started again, and goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CONVERT = [sys.executable, "-m", "spark_fast.cli.convert"]


def convert(*words: str) -> None:
    """One part on some node; raises where the command fails."""
    subprocess.run([*CONVERT, *words], check=True)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("dst")
    parser.add_argument("--parts", type=int, default=8, help="tasks (%(default)s)")
    parser.add_argument("--cpus", type=int, default=16, help="cores that Ray reserves for a task (%(default)s)")
    given, flags = parser.parse_known_args(argv)
    import ray  # here, so that --help needs no Ray

    ray.init(ignore_reinit_error=True)
    src, dst = (str(Path(path).absolute()) for path in (given.src, given.dst))  # a task has a folder of its own
    part = ray.remote(num_cpus=given.cpus, max_retries=3, retry_exceptions=True)(convert)
    ray.get([part.remote(src, dst, *flags, f"--part={i + 1}/{given.parts}") for i in range(given.parts)])
    return subprocess.run([*CONVERT, dst, "--merge"]).returncode


if __name__ == "__main__":
    sys.exit(main())
