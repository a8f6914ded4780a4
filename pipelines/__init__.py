"""Every way to bring image batches to the device, behind one contract."""

from spark_fast.pipelines.base import Batch, DataError, Pipeline, Problems
from spark_fast.pipelines.build import build_pipeline

__all__ = ["Batch", "DataError", "Pipeline", "Problems", "build_pipeline"]
