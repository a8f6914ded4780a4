"""`torchrun ... -m spark_fast.evaluate`: the command spark-fast-eval, which is spark_fast/cli/eval.py."""

import sys

from spark_fast.cli.start import evaluate as main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
