"""`spark-fast-convert` from a checkout: the command itself is spark_fast/cli/convert.py."""

import sys

from spark_fast.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
