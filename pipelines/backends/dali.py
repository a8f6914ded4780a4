"""Batches decoded by NVIDIA DALI, in the sampler's order, with the augmentation's crops.

`batch_decoder` reads and examines the images; here is DALI's graph: encoded images, boxes and flips in, bytes out.
Nothing is in flight inside DALI between two calls. `decode` feeds one batch, runs the graph once and takes
the result, so there is no reader with an epoch of its own, nothing to drain when training stops, and after
a failure the graph is built anew (10 ms) without a batch being lost. The caller overlaps batches by owning several
decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.commands import INSTALL_DALI
from spark_fast.errors import SettingsError
from spark_fast.pipelines.backends.batch_decoder import BatchDecoder, DecoderError, Encoded, EncodedPipeline


class _Output(Protocol):
    def as_tensor(self) -> object: ...


class _Graph(Protocol):
    """A built DALI pipeline."""

    def run(self, **inputs: Sequence[NDArray[np.uint8]] | NDArray[np.generic]) -> tuple[_Output]: ...


class DaliPipeline(EncodedPipeline):
    """Batches of `source`, as the options say. SettingsError without DALI."""

    def _make_decoder(self) -> BatchDecoder:
        return DaliDecoder(self._share, self._size, self.device, self._workers)

    def _finished(self, decoded: Tensor) -> Tensor:
        return self._normalised(decoded)


def as_ppm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels, (H, W, 3), as a file that DALI decodes without loss: a PPM is a header and the bytes."""
    return np.frombuffer(b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes(), np.uint8)


class DaliDecoder:
    """Decodes, crops, resizes and flips up to `batch_size` images at once; for one thread at a time."""

    name = "DALI"

    def __init__(self, batch_size: int, size: tuple[int, int], device: torch.device, threads: int) -> None:
        """Build the graph for images of `size` (H, W); SettingsError when DALI is not installed."""
        self._settings = (batch_size, size, device, threads)
        self._size = size
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph: _Graph | None = _build(*self._settings)

    def decode(self, images: Sequence[Encoded]) -> Tensor:
        """The images, (n, H, W, 3) uint8 on the device, in memory that no later call writes to.

        Raises DecoderError when DALI fails on one of them (it does not say which); the decoder can be used again.
        """
        assert self._graph is not None, "closed"
        height, width = self._size
        boxes = np.array([image.box for image in images], np.int32)  # (n, 4): top, left, height, width
        # A negative size mirrors: the flip costs nothing.
        sizes = np.array([(height, -width if image.flip else width) for image in images], np.float32)
        try:
            (out,) = self._graph.run(
                encoded=[image.data if image.data.ndim == 1 else as_ppm(image.data) for image in images],
                start=boxes[:, :2].copy(),
                shape=boxes[:, 2:].copy(),
                size=sizes,
            )
        except Exception as error:  # DALI raises built-in exceptions of several types
            self._graph = _build(*self._settings)  # DALI calls the one that failed invalid
            raise DecoderError(_gist(error)) from error
        if self._stream is None:
            return torch.from_dlpack(out.as_tensor())  # DALI's buffer, but ours as long as we hold it (exec_dynamic)
        with torch.cuda.stream(self._stream):  # not behind the kernels of the training step
            pixels = torch.from_dlpack(out.as_tensor()).clone()
        self._stream.synchronize()  # before DALI may have its buffer back
        return pixels

    def close(self) -> None:
        """Release DALI's threads and buffers."""
        self._graph = None


def _build(batch_size: int, size: tuple[int, int], device: torch.device, threads: int) -> _Graph:
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise SettingsError(
            f"--pipeline dali needs NVIDIA DALI, which cannot be imported ({error}). Install it with\n"
            f"  {INSTALL_DALI}\n"
            "or, which is the same, pip install nvidia-dali-cuda130"
        ) from error
    on_cuda = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_cuda else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    def graph() -> object:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        mirrored_size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        crop = fn.decoders.image_slice(  # decodes the region of interest alone; on CUDA in hardware where it can
            encoded,
            device="mixed" if on_cuda else "cpu",
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # on CUDA what libjpeg does; nearest-neighbour chroma otherwise
            affine=False,  # pinned threads of several ranks would share the first cores
        )
        return fn.resize(crop, size=mirrored_size, interp_type=types.INTERP_CUBIC, antialias=True)

    built = graph()
    built.build()
    return built


def _gist(error: Exception) -> str:
    """The line of DALI's page-long message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[after] if after < len(lines) else repr(error)
