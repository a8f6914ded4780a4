"""`spark-fast-reconstruct` from a checkout: the command itself is spark_fast/cli/reconstruct.py."""

import sys

from spark_fast.cli.start import reconstruct

if __name__ == "__main__":
    sys.exit(reconstruct())
