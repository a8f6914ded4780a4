"""`spark-fast-export` from a checkout: the command itself is spark_fast/cli/export.py."""

import sys

from spark_fast.cli.start import export

if __name__ == "__main__":
    sys.exit(export())
