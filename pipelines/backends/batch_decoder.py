"""Batches decoded as a whole, by DALI or nvJPEG, in the sampler's order, with the augmentation's crops.

Three stages: `workers` threads read the files and examine them; a decoder takes a whole batch of encoded images
with their boxes and flips; the device normalises. Order, boxes and flips come from `sampler` and `crops`, as for
every backend.

The decoder gets only what it decodes as the other backends do: colour and grey JPEGs. `decode_image` decodes all else
(CMYK, PNG ...), which is handed over as pixels. These decoders turn a damaged scan into grey without an error, or raise
an error that does not name the image. So `decode_image` checks each image strictly the first time it is read, and its
checksum is kept (4 bytes an image). While the checksum is the same, the image goes straight to the decoder. This costs
a second decoding in a pipeline's first epoch, and none after it.
"""

from __future__ import annotations

import logging
import queue
import threading
import zlib
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.errors import ImageError
from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.base import Batch
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler, Share, uniform
from spark_fast.pipelines.sources.bad_images import Loaded, candidates, none_readable
from spark_fast.pipelines.sources.source import Source, naming_image, read_patiently
from spark_fast.pipelines.transforms.crops import DRAWS, Box
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.resize import crop

logger = logging.getLogger("spark_fast.pipelines")


class DecoderError(RuntimeError):
    """A decoder could not decode a batch; the message is its reason."""


class Encoded(NamedTuple):
    """One image for a decoder."""

    data: NDArray[np.uint8]  # (bytes,) of a JPEG; or pixels (h, w, 3), of the box alone
    box: Box
    flip: bool


class BatchDecoder(Protocol):
    """Decodes, crops, resizes and flips a batch at once; for one thread at a time."""

    name: str

    def decode(self, images: Sequence[Encoded]) -> Tensor:
        """The images on the device, in memory that no later call writes to.

        They are (n, H, W, 3) uint8, or (n, 3, H, W) if the decoder normalises too. Raises DecoderError when one of
        them cannot be decoded; the decoder can be used again.
        """
        ...

    def close(self) -> None:
        """Release threads and buffers."""
        ...


Examined = tuple[Encoded, Loaded]


class _Request(NamedTuple):
    """Samples to read, a batch or part of one."""

    ids: NDArray[np.int64]  # (n,)
    draws: NDArray[np.float64]  # (n, DRAWS)
    left: threading.Event  # set when the consumer is gone


class _Pending(NamedTuple):
    """A batch in preparation."""

    ids: NDArray[np.int64]
    read: list[Future[list[Examined]]]
    decoded: Future[tuple[Tensor, list[Loaded]]]


class EncodedPipeline(Backend):
    """Batches of `source`, as the options say. SettingsError without the decoder."""

    def __init__(self, source: Source, sampler: Sampler, options: LoaderOptions) -> None:
        super().__init__(source, sampler, options)
        self._sound = np.zeros(len(source), np.uint32)  # checksums of the images that `decode_image` approved
        self._refused: set[int] = set()  # samples that the decoder cannot decode, though they are sound
        self._logged = False
        # On CUDA two take turns: one is fed while the other decodes.
        self._decoders = [self._make_decoder() for _ in range(2 if self._on_cuda else 1)]
        self._idle: queue.SimpleQueue[BatchDecoder] = queue.SimpleQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._readers = ThreadPoolExecutor(self._workers, thread_name_prefix="decode-read")
        self._decode_threads = ThreadPoolExecutor(len(self._decoders), thread_name_prefix="decode-batch")

    @abstractmethod
    def _make_decoder(self) -> BatchDecoder:
        """A decoder for this pipeline's batches."""

    @abstractmethod
    def _finished(self, decoded: Tensor) -> Tensor:
        """The decoder's output as the images of a batch, (B, 3, H, W)."""

    def close(self) -> None:
        """Stop the threads, close the decoders and close the source."""
        self._closed.set()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._decode_threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()
        self._source.close()

    def _batches(self, steps: Iterator[Share]) -> Generator[Batch, None, None]:
        left = threading.Event()
        pending: deque[_Pending] = deque()

        def submit_next() -> None:
            if (share := next(steps, None)) is not None:
                draws = uniform(self._sampler.seed, share.draw_ids, share.ids, DRAWS)
                pending.append(self._submit(_Request(share.ids, draws, left)))

        try:
            for _ in range(self._prefetch):
                submit_next()
            while pending:
                images = self._collect(pending[0])
                ids = pending.popleft().ids
                submit_next()
                yield Batch(images, self._labels(ids), torch.from_numpy(ids.copy()))
        finally:
            left.set()
            decoded = [batch.decoded for batch in pending if not batch.decoded.cancel()]
            read = [part for batch in pending for part in batch.read if not part.cancel()]
            wait(decoded), wait(read)

    def _submit(self, batch: _Request) -> _Pending:
        """Let the threads prepare this batch."""
        ids, draws, left = batch
        parts = [_Request(ids[part], draws[part], left) for part in self._parts(len(ids))]
        read = [self._readers.submit(self._read, part) for part in parts]
        return _Pending(ids, read, self._decode_threads.submit(self._decode, batch, read))

    def _read(self, request: _Request) -> list[Examined]:
        """In a reader thread: these samples, ready for the decoder."""
        examined = []
        for sample, draws in zip(request.ids.tolist(), request.draws.tolist(), strict=True):
            self._stop_unless_wanted(request.left)
            with naming_image(self._source, sample):
                examined.append(self._load(sample, draws))
        return examined

    def _load(self, sample: int, draws: Sequence[float]) -> Examined:
        """A sample, or the image that stands in for it, as its file or as pixels; as `ImageLoader.load` otherwise."""
        reason: Exception | None = None
        for i in candidates(self._source, sample):
            try:
                encoded, loaded = self._examine(i, read_patiently(self._source, i), draws, sample in self._refused)
            except (ImageError, OSError) as error:
                reason = reason or error
                continue
            return encoded, loaded._replace(substituted=None if reason is None else str(reason))
        raise none_readable(self._source, sample, reason)

    def _examine(self, i: int, data: bytes | memoryview, draws: Sequence[float], refused: bool) -> Examined:
        """An image for the decoder, which may have `refused` it, as image i itself.

        Raises ImageError when it cannot be decoded.
        """
        augmentation, flip = self._augmentation, self._augmentation.flips(draws)
        height, width, colours = _jpeg_header(data)
        checksum = zlib.crc32(data)
        plain = colours in ("YCbCr", "Gray")
        for_decoder = plain and not refused
        if for_decoder and checksum and self._sound[i] == checksum:
            box = augmentation.box(draws, height, width)
            return Encoded(np.frombuffer(data, np.uint8), box, flip), Loaded(colours == "Gray", None)
        decoded = decode_image(data, self._max_pixels)
        pixels, converted = decoded.pixels, decoded.converted
        loaded = Loaded(converted, None, decoded.losses)
        box = augmentation.box(draws, *pixels.shape[:2])
        if for_decoder and converted == (colours == "Gray"):  # not one that has a fault, if a harmless one
            self._sound[i] = checksum
            return Encoded(np.frombuffer(data, np.uint8), box, flip), loaded
        if not plain:
            self._log_other_format(i)
        return Encoded(crop(pixels, box), Box(0, 0, box.height, box.width), flip), loaded

    def _decode(self, batch: _Request, read: list[Future[list[Examined]]]) -> tuple[Tensor, list[Loaded]]:
        """In a decode thread: wait for a batch's files, run the decoder."""
        examined = [image for part in read for image in part.result()]
        if batch.left.is_set() or self._closed.is_set():
            raise CancelledError
        decoder = self._idle.get()
        try:
            pixels = decoder.decode([encoded for encoded, _ in examined])
        except DecoderError:
            self._find_refused(decoder, batch.ids, examined)
            examined = self._read(batch)  # now with the pixels of those
            pixels = decoder.decode([encoded for encoded, _ in examined])
        finally:
            self._idle.put(decoder)
        return pixels, [loaded for _, loaded in examined]

    def _find_refused(self, decoder: BatchDecoder, ids: NDArray[np.int64], examined: list[Examined]) -> None:
        """Note which images of a batch the decoder refuses, though `decode_image` reads them; each once in a run."""
        for sample, (encoded, _) in zip(ids.tolist(), examined, strict=True):
            try:
                decoder.decode([encoded])
            except DecoderError as error:  # noqa: PERF203
                self._refused.add(sample)
                name = self._source.name(sample)
                text = "image %d (%s) is sound, but %s refuses it (%s): decoded without"
                logger.warning(text, sample, name, decoder.name, error)

    def _collect(self, batch: _Pending) -> Tensor:
        """Wait for a batch, and count its bad images: (B, 3, H, W)."""
        try:
            decoded, loaded = batch.decoded.result()
        except CancelledError:
            raise RuntimeError("this pipeline was closed while it was being read") from None
        self._bad_images.count(batch.ids.tolist(), loaded)
        if decoded.is_cuda:
            decoded.record_stream(torch.cuda.current_stream(self.device))  # it was allocated on another
        return self._finished(decoded)

    def _log_other_format(self, i: int) -> None:
        if not self._logged:
            self._logged = True
            name = self._source.name(i)
            text = "image %d (%s) and others that are no colour or grey JPEG are decoded without %s"
            logger.info(text, i, name, self._decoders[0].name)


def _jpeg_header(data: bytes | memoryview) -> tuple[int, int, str]:
    """Height, width and colours of a JPEG; (0, 0, "") of anything else, and of what needs a closer look."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # KeyError, too, where TurboJPEG knows more chroma layouts than simplejpeg
        return 0, 0, ""
    return height, width, colours
