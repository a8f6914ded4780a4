"""`torchrun ... -m spark_fast.train`: the command spark-fast-train, which is spark_fast/cli/train.py."""

import sys

from spark_fast.cli.start import train as main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
