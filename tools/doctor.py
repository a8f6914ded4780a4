"""`spark-fast-doctor` from a checkout: the command itself is spark_fast/cli/doctor.py."""

import sys

from spark_fast.cli.start import doctor

if __name__ == "__main__":
    sys.exit(doctor())
