"""Batches decoded by NVIDIA DALI, in our order, with our crops: `encoded_pipeline` with DALI's decoder."""

from __future__ import annotations

from torch import Tensor

from spark_fast.pipelines.backends.batch_decoder import BatchDecoder, EncodedPipeline
from spark_fast.pipelines.backends.dali import DaliDecoder


class DaliPipeline(EncodedPipeline):
    """Batches of `source`, as the options say. SettingsError without DALI."""

    def _make_decoder(self) -> BatchDecoder:
        return DaliDecoder(self._share, self._size, self.device, self._workers)

    def _finished(self, decoded: Tensor) -> Tensor:
        return self._normalised(decoded)
