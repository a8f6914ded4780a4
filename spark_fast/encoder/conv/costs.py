"""Which algorithm of `spark_fast.encoder.conv.convolve` is the fastest for a convolution, by a model of each device.

The choice follows from static shapes, the visible share and the device alone, so that compiled code never changes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from spark_fast.encoder.conv.geometry import Axis


class GpuRates(NamedTuple):
    """What a GPU moves and computes in a second: the constants of its model.

    `benchmarks/conv_algorithms.py --device cuda` measures layers there and prints the constants that fit them. No GPU
    has been met yet: these are arithmetic from the data sheet of an H200.
    """

    memory: float = 4.0e12  # bytes; of 4.8e12 on the data sheet, as a copy reaches
    cache: float = 5.5e12  # bytes read from L2: an assumption, no data sheet has it
    products: float = 700e12  # FLOPs of cuDNN and cuBLAS in bf16; of 989e12
    grouped: float = 67e12  # FLOPs of a grouped convolution, which fills no tensor core: fp32 on the data sheet
    element: int = 2  # bytes, of bf16


GPU_RATES = GpuRates()


def choose_algorithm(
    b: int, axes: tuple[Axis, Axis], weight: Tensor, groups: int, visible_ratio: float, kernels: bool = False
) -> str:
    """The algorithm of least `algorithm_costs`, or of least `gpu_costs` for a weight on CUDA or with the GPU kernels.

    `weight` is (O, C/groups, ky, kx). With the kernels a depthwise layer is always `direct`.
    """
    if kernels and groups == weight.shape[0] > 1 and weight.shape[1] == 1:
        return "direct"
    if kernels or weight.is_cuda:
        estimated = gpu_costs(b, axes, weight, groups, visible_ratio, kernels)
    else:
        estimated = algorithm_costs(b, axes, weight, groups, visible_ratio)
    return min(estimated, key=estimated.__getitem__)


def algorithm_costs(
    b: int, axes: tuple[Axis, Axis], weight: Tensor, groups: int, visible_ratio: float
) -> dict[str, float]:
    """The time of every algorithm that can convolve patches of b x b cells, in units of the dense layer over all cells.

    Args:
        b: cells per patch side.
        axes: the layer's geometry.
        weight: (O, C/groups, ky, kx).
        groups: of the layer.
        visible_ratio: the visible share of the patches.

    The constants were fitted to 495 layers measured on a CPU (`benchmarks/conv_algorithms.py`): halo costs by the cells
    of its windows, more where its output is small; im2col by its cells and by the copies of each; dense by all cells.
    """
    y, x = axes
    if _is_pointwise(axes, groups):
        return {"pointwise_gemm": visible_ratio}
    found = {"dense": 1 + 0.2 / b}
    if _looks_too_far(b, axes):
        return found
    window = visible_ratio * _window_cells(b, axes)
    if groups > 1:
        return {**found, "halo": window / 1.8}
    outputs, copies = (b // y.stride) ** 2, y.kernel * x.kernel / y.stride**2
    im2col = visible_ratio * ((1 if y.stride == 1 else 0.75) + 4.4 * copies / weight.shape[1])
    if copies <= 1:  # its inputs are then no larger than a window
        return {**found, "im2col": im2col}
    return {**found, "halo": 0.45 * window * (1 + 8 / outputs), "im2col": im2col}


def gpu_costs(
    b: int,
    axes: tuple[Axis, Axis],
    weight: Tensor,
    groups: int,
    visible_ratio: float,
    kernels: bool = True,
    rates: GpuRates = GPU_RATES,
) -> dict[str, float]:
    """The seconds per cell of the dense map of every algorithm, forward and backward, on a GPU.

    Each pass takes as long as its bytes or its FLOPs, whichever is longer; passes add up. Copies beside the three
    convolutions (forward, and the gradients of input and weight) are counted as `_Convolve` makes them, backward
    gathering again. Launches are not counted: what they cost depends on the batch.

    Args:
        b, axes, weight, groups, visible_ratio: as for `algorithm_costs`; the weight is (O, C/groups, ky, kx).
        kernels: `halo` by the GPU kernels, else by index tables.
        rates: of the GPU.
    """
    y, x = axes
    if _is_pointwise(axes, groups):
        return {"pointwise_gemm": visible_ratio}
    c, o, strides = weight.shape[1] * groups, len(weight), y.stride * x.stride
    out, flops = o / strides, 2 * o * weight.shape[1] * y.kernel * x.kernel / strides  # per cell
    rate = rates.products if groups == 1 else rates.grouped

    def convolution(read: float, work: float = 1.0, rate: float = rate) -> float:
        return max((read + out) * rates.element / rates.memory, work * flops / rate)

    def copies(numbers: float) -> float:
        return numbers * rates.element / rates.memory

    exchanged = any(axis.exchanged for axis in axes)
    laid, padded = c * (1 + 2 * visible_ratio), 2 * c * exchanged
    moved = 2 * (laid + padded) + out * (1 + 4 * visible_ratio) + padded + 2 * visible_ratio * c
    found = {"dense": 3 * convolution(c) + copies(moved)}
    if kernels and groups == 1 and c % 8 == o % 8 == 0:  # vectors of 16 bytes
        tiles = ((256, o), (256, c), (o, c))  # of output, input gradient and weight gradient
        found["direct"] = visible_ratio * sum(convolution(c, rate=_tile_rate(*tile, rates)) for tile in tiles)
    if _looks_too_far(b, axes):
        return found
    window = _window_cells(b, axes)
    # the input's gradient is computed at every cell of the window
    windows = 2 * convolution(c * window) + convolution(c * window, window)
    found["halo"] = visible_ratio * (windows + exchanged * copies(_moved(c, c * window, kernels)))
    if groups == 1:
        taps = c * y.kernel * x.kernel / strides
        moved = _moved(c, taps, kernels and y.window_is_taps(b) and x.window_is_taps(b))
        found["im2col"] = visible_ratio * (3 * convolution(taps) + copies(moved))
    return found


def _tile_rate(rows: int, columns: int, rates: GpuRates) -> float:
    """FLOPs a second of a product of tiles, at most 256 x 128, that are read from L2 (`kernels.tile.product_tiles`)."""
    per_byte = 2 / ((1 / min(rows, 256) + 1 / min(columns, 128)) * rates.element)
    return min(rates.products, rates.cache * per_byte)


def _moved(cells: float, gathered: float, kernels: bool) -> float:
    """Numbers read and written to gather twice and to sum once: tables copy their source to append a row of zeros."""
    return 3 * cells + 3 * gathered if kernels else 5 * cells + 7 * gathered


def _is_pointwise(axes: tuple[Axis, Axis], groups: int) -> bool:
    return groups == 1 and all(axis.kernel == 1 and axis.lo == 0 for axis in axes)


def _looks_too_far(b: int, axes: tuple[Axis, Axis]) -> bool:
    """Further than the next patch, where index tables end."""
    return max(max(axis.lo, axis.hi) for axis in axes) > b


def _window_cells(b: int, axes: tuple[Axis, Axis]) -> float:
    """Cells of a window over those of its patch."""
    return len(axes[0].window(b)) * len(axes[1].window(b)) / b**2
