"""`spark-fast-export` from a checkout: the command itself is spark_fast/cli/export.py."""

import sys

from spark_fast.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
