"""SparK pre-training for any ConvNet, at the cost of the visible patches alone."""

from spark_fast.encoder import pack
from spark_fast.encoder.verify import verify
from spark_fast.published import load_spark_state_dict
from spark_fast.spark import SparK, build_spark

__all__ = ["SparK", "build_spark", "load_spark_state_dict", "pack", "verify"]
__version__ = "0.1.0"
