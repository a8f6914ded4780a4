"""SparK pre-training for any ConvNet, at the cost of the visible patches alone."""

import os

# Before torch loads OpenMP: a thread that waits for another one sleeps instead of spinning. Where the cores are shared
# (decoding threads, another job) spinning made a step 5 times slower, measured; alone it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from spark_fast.encoder import pack
from spark_fast.encoder.verify import verify
from spark_fast.published import load_spark_state_dict
from spark_fast.spark import SparK, build_spark

__all__ = ["SparK", "build_spark", "load_spark_state_dict", "pack", "verify"]
__version__ = "0.1.0"
