"""A whole training step as one CUDA graph: the host says "again" instead of launching thousands of kernels.

The first steps run in the ordinary way, on a side stream: they compile kernels, choose algorithms and make the
optimiser's state. The next step is captured: its kernels are recorded with the addresses that they read and write, and
do not run. From then on every step is a replay. So all that changes between steps must keep its place on the device:
images and mask are copied into tensors held here, rates are device scalars (`DeviceRates`), the number of steps is
counted in place. Random numbers follow the device generator's seed at the time of the replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spark_fast.reporting.step_timer import GRAPH, StepClock

WARM_UP = 3  # ordinary steps before the capture, as torch.cuda.make_graphed_callables has it


class StepGraph:
    """Calls `work`, and replays it once it is captured.

    Args:
        work: tensors of any shape -> tensors of any shape. It may not read their values on the host, and their shapes
            must not change.
        clock: stopped during the capture; a replay is its phase "graph".
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], device: torch.device, clock: StepClock) -> None:
        self._work, self._clock = work, clock
        self._stream = torch.cuda.Stream(device)
        self._warm_up = WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Do the work once, by launches or by a replay; the results are the caller's own tensors.

        Raises:
            ValueError: inputs of another shape or dtype than those captured.
        """
        if self._warm_up:
            self._warm_up -= 1
            return self._ordinary(inputs)
        if self._graph is None:
            self._graph = self._capture(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            if (held.shape, held.dtype) != (given.shape, given.dtype):
                wanted, got = (f"{tuple(x.shape)} {x.dtype}" for x in (held, given))
                raise ValueError(f"the step was captured for {wanted}, got {got}")
            held.copy_(given)
        self._clock.mark(GRAPH)
        self._graph.replay()
        self._clock.mark(None)
        return tuple(output.clone() for output in self._outputs)

    def _ordinary(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._work(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the device: they upload and decode the next batches
        capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with self._clock.stopped(), capture:
            self._outputs = self._work(*self._inputs)
        return graph
