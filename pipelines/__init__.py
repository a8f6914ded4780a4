"""Every way to bring image batches to the device, behind one interface: `build_pipeline(path, options)`."""

from spark_fast.errors import DataError
from spark_fast.pipelines.base import BadImageCounts, Batch, Pipeline
from spark_fast.pipelines.build import build_pipeline
from spark_fast.pipelines.options import LoaderOptions, View

__all__ = ["BadImageCounts", "Batch", "DataError", "LoaderOptions", "Pipeline", "View", "build_pipeline"]
