"""Every way to bring image batches to the device, behind one contract."""

from pipelines.build import build_pipeline
from pipelines.contract import Batch, DataError, Pipeline, Problems

__all__ = ["Batch", "DataError", "Pipeline", "Problems", "build_pipeline"]
