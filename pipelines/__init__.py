"""Every way to bring image batches to the device, behind one contract."""

from spark_fast.pipelines.build import build_pipeline
from spark_fast.pipelines.contract import Batch, DataError, Pipeline, Problems

__all__ = ["Batch", "DataError", "Pipeline", "Problems", "build_pipeline"]
