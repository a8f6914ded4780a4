"""An FFCV Loader that takes a given order, crops and flips, and whose failures reach the consumer.

FFCV hands its decoder the sample numbers of a batch: rows of the array that its traversal order makes. Here a
row holds more than the number (`ffcv_kernel.PLAN`), so that crops and flips travel the same way. The reader, the
memory map, the graph and its compilation, and the ring of buffers are FFCV's own. The loop of its thread is replaced:
FFCV's ends silently on an error, and the consumer waits for ever.

To be imported only where FFCV is known to be installed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.loader.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.traversal_order.base import TraversalOrder
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.backends.ffcv_kernel import decode_planned
from spark_fast.pipelines.sources.bad_images import Loaded
from spark_fast.pipelines.sources.beton import BetonSource

if TYPE_CHECKING:
    from ffcv.pipeline.state import State

Prepare = Callable[[NDArray[np.void]], list[list[float]]]  # rows of a plan -> the samples' random numbers
Finish = Callable[[NDArray[np.void], list[list[float]], Tensor], list[Loaded]]

# One kernel at a time: numba's simplest thread pool, its last resort, ends the process when two callers meet.
_kernel = threading.Lock()
_POLL_SECONDS = 0.1


class Decoded(NamedTuple):
    """One batch, in memory that is filled again once the next one is asked for."""

    plan: NDArray[np.void]  # (n,) PLAN
    pixels: Tensor  # (n, H, W, 3) uint8
    loaded: list[Loaded]


class PlannedLoader(Loader):
    """Batches of a .beton as a plan says; `planned` starts an epoch."""

    def __init__(
        self, source: BetonSource, batch_size: int, size: tuple[int, int], bicubic: bool, workers: int, ahead: int
    ) -> None:
        """Images of `size` (H, W) from a file whose tables `source` has found to be those that were written."""
        threads = torch.get_num_threads()
        try:
            super().__init__(
                str(source.path),
                batch_size=batch_size,
                num_workers=min(workers, numba.config.NUMBA_NUM_THREADS),
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                batches_ahead=ahead,
                pipelines={"image": [_PlannedDecoder(size, bicubic)], "label": None},
            )
        finally:
            torch.set_num_threads(threads)  # FFCV sets it, for the whole process
        self.traversal_order = PlannedOrder(self)  # its constructor takes no class of ours in version 1.0.2

    def planned(
        self,
        plan: NDArray[np.void],
        prepare: Prepare,
        finish: Finish,
    ) -> PlannedEpoch:
        """Start to decode `plan`, (n,) PLAN rows in whole batches.

        Both callbacks run in FFCV's thread, once a batch. `prepare(rows)` sets boxes and flips.
        `finish(rows, what prepare returned, pixels)` may read the faults and repair the pixels, (B, H, W, 3) uint8.
        """
        self.traversal_order.plan = plan
        return PlannedEpoch(self, self.traversal_order.sample_order(self.next_epoch), prepare, finish)


class PlannedOrder(TraversalOrder):
    """The plan of the next epoch, whatever its number: a plan is made for one epoch."""

    plan: NDArray[np.void]

    def sample_order(self, epoch: int) -> NDArray[np.void]:
        """The rows, (n,) PLAN, in the order of decoding."""
        return self.plan


class PlannedEpoch(EpochIterator):
    """The thread that decodes `plan`, (n,) PLAN, some batches ahead, and the iterator over what it decoded."""

    def __init__(self, loader: PlannedLoader, plan: NDArray[np.void], prepare: Prepare, finish: Finish) -> None:
        self._prepare, self._finish = prepare, finish
        super().__init__(loader, plan)  # starts the thread

    def run(self) -> None:
        """The thread's loop: decode each batch of the plan and hand it over; an error is handed over, too."""
        slots = self.loader.batches_ahead + 2
        try:
            numba.set_num_threads(self.loader.num_workers)
            for step, plan in enumerate(self.iter_ixes):
                if self._left():
                    return
                prepared = self._prepare(plan)
                with _kernel:
                    (result,) = self.run_pipeline(step, plan, step % slots, None)
                pixels = torch.from_numpy(result)
                self._hand_over(Decoded(plan, pixels, self._finish(plan, prepared, pixels)))
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def __next__(self) -> Decoded:
        """The next batch; raises what went wrong while it was made."""
        while True:
            try:
                item = self.output_queue.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise RuntimeError("this epoch was closed while it was being read") from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread, after the batch it is at."""
        self.terminate_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def _left(self) -> bool:
        """Whether nobody waits any more, or the interpreter is ending."""
        return self.terminate_event.is_set() or not threading.main_thread().is_alive()

    def _hand_over(self, item: Decoded | BaseException | None) -> None:
        while not self._left():
            with suppress(queue.Full):
                self.output_queue.put(item, timeout=_POLL_SECONDS)
                break


class _PlannedDecoder(SimpleRGBImageDecoder):
    """FFCV's operation around our kernel."""

    def __init__(self, size: tuple[int, int], bicubic: bool) -> None:
        super().__init__()
        self._size, self._bicubic = size, bicubic

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, kind = (*self._size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., NDArray[np.uint8]]:
        bicubic = self._bicubic

        def decode(plan, out, metadata, storage):
            file, starts, sizes = storage
            decode_planned(plan, metadata, file, starts, sizes, out, bicubic)
            return out

        return decode
