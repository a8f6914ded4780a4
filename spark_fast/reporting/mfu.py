"""How much of the device a run uses: its matrix product rate, MFU, and the peak of memory.

MFU (model FLOPs utilisation; Chowdhery et al., PaLM, 2022, appendix B) is here

    images/s of one rank * FLOP per image / the device's measured rate of matrix products

with the FLOP that the task needs (`flops.Cost.flop_per_image`). The denominator is measured at the start, in the run's
precision, not taken from a data sheet, so a CPU has one too, and 100 % is what this machine reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor

from spark_fast.operating_system import peak_resident_bytes
from spark_fast.reporting.flops import Cost

FIRST, LAST = 256, 4096  # sides of the matrices tried
LONG_ENOUGH = 5e-3  # seconds; the time of a shorter product is that of its launch, not of its arithmetic
REPEATS, PATIENCE = 10, 0.1  # products timed; after so many seconds fewer are enough


class MfuMeter:
    """MFU and memory of this rank.

    Args:
        cost: of an image.
        rate: FLOP/s of the device, `matmul_rate`.
        world_size: ranks that share the images.
    """

    def __init__(self, cost: Cost, rate: float, device: torch.device, world_size: int) -> None:
        self.cost, self.rate, self.device, self.world_size = cost, rate, device, world_size

    def read(self, images_per_second: float) -> dict[str, float]:
        """`mfu`, 0 to 1, and `memory_gib`, at `images_per_second` over all ranks."""
        mfu = images_per_second / self.world_size * self.cost.flop_per_image / self.rate
        return {"mfu": mfu, "memory_gib": peak_memory(self.device) / 2**30}


def peak_memory(device: torch.device) -> int:
    """Bytes, the most so far: of tensors on a GPU; on the CPU of the whole process (its peak resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype`: the median of a few, in a tenth of a second or two.

    The matrices grow until a product takes long enough, or to 4096. In fp32 a GPU may use TF32 if its convolutions may.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    side = FIRST
    with _precision_of_convolutions():
        while True:
            a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
            _seconds(a, b)  # the first one of a size is slower
            times = [_seconds(a, b)]
            if times[0] >= LONG_ENOUGH or side == LAST:
                break
            side *= 2
        while len(times) < REPEATS and sum(times) < PATIENCE:
            times.append(_seconds(a, b))
    return 2 * side**3 / statistics.median(times)


def is_emulated(rate: float, fp32_rate: float) -> bool:
    """Whether a precision of this `matmul_rate` is one that the device has no instructions for.

    With such instructions products are as fast as in fp32 or faster, without them many times slower.
    """
    return rate < fp32_rate / 2


def _seconds(a: Tensor, b: Tensor) -> float:
    """The time of a @ b; waits for the device."""
    _wait(a.device)
    begun = time.perf_counter()
    torch.mm(a, b)
    _wait(a.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _precision_of_convolutions() -> Iterator[None]:
    """Matrix products use TF32 here if convolutions do: by default torch allows it for convolutions alone."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = attrgetter("conv.fp32_precision")(torch.backends.cudnn)  # its type knows no `conv`
    try:
        yield
    finally:
        products.fp32_precision = before
