"""`spark-fast-plot` from a checkout: the command itself is spark_fast/cli/plot.py."""

import sys

from spark_fast.cli.start import plot

if __name__ == "__main__":
    sys.exit(plot())
