"""`spark-fast-convert` from a checkout: the command itself is spark_fast/cli/convert.py."""

import sys

from spark_fast.cli.start import convert

if __name__ == "__main__":
    sys.exit(convert())
