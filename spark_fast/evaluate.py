"""`torchrun ... -m spark_fast.evaluate`: the command spark-fast-eval, which is spark_fast/cli/evaluate.py."""

import sys

from spark_fast.cli.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
