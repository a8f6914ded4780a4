"""What the two ways to compute a layer of the decoder cost on a GPU, by a model of its bytes, FLOPs and launches.

Each pass takes as long as its bytes or its FLOPs, whichever is longer; passes, forward and backward, add up. As in
`spark_fast.encoder.conv.costs`, the choice follows from static shapes alone.
"""

from __future__ import annotations

from typing import NamedTuple


class DecoderRates(NamedTuple):
    """The constants. `benchmarks/device_report.py --only layers` prints those that fit what it has measured.

    No GPU has been met yet: these are arithmetic from the data sheet of an H200, in bf16.
    """

    memory: float = 4.0e12  # bytes a second; of 4.8e12 on the data sheet, as a copy reaches
    rows: float = 2.0e12  # bytes a second of a gather of rows and of a sum of gathered rows: an assumption
    products: float = 700e12  # FLOPs a second of cuDNN and cuBLAS; of 989e12
    launch: float = 2e-6  # seconds a small kernel takes at least


DECODER_RATES = DecoderRates()
ELEMENT = 2  # bytes, of bf16
EDGE_LAUNCHES = 86  # what merging launches more, counted: the merge of the weights, the lines at the four edges
TABLE_LAUNCHES = 24  # and a projection from the visible cells: its tables and copies


def merging_costs(batch: int, h: int, w: int, c: int, rates: DecoderRates = DECODER_RATES) -> dict[str, float]:
    """Seconds of a transposed convolution and the 3x3 convolution after it: `merged` into one, or `apart`.

    Args:
        batch, h, w: of the input; the output has 2h x 2w pixels.
        c: channels before, between and after the two.
    """
    x, y, square = batch * h * w * c, 4 * batch * h * w * c, 2 * c * c  # FLOPs of a tap
    merge = 324 + 144 + 144  # taps of the merged weight and of its two gradients: the first multiplies its padding too
    edges = 3 * 4 * batch * (h + w) * (2 + 3)  # taps of the two convolutions along them
    small = (merge * c + edges) * square / rates.products + EDGE_LAUNCHES * rates.launch
    return {
        "merged": 3 * _pass(x + y, 9 * y / c * square, rates) + small,
        "apart": 3 * (_pass(x + y, 4 * y / c * square, rates) + _pass(2 * y, 9 * y / c * square, rates)),
    }


def projection_costs(
    cells: int, visible_ratio: float, c: int, n: int, rates: DecoderRates = DECODER_RATES
) -> dict[str, float]:
    """Seconds of a 3x3 projection from `all` cells of the map, laid out before, or from the `visible` ones.

    Args:
        cells: of the dense map, B*H*W, a share `visible_ratio` of them visible.
        c, n: channels of the level, and of the decoder.
    """
    work, rows, out = 2 * 9 * cells * c * n, visible_ratio * cells * c, cells * n
    laid = 2 * cells * c + 4 * rows  # the map filled, rows put in place, their gradients taken out
    taps = 9 * visible_ratio * out  # nine contributions of each visible cell
    copied = 4 * rows + 5 * out + 2 * taps  # a row for the token and one of zeros, the bias, the holes' share
    tables = 9 * cells * 60  # bytes: their numbers in int32 and int64, each computed in steps
    return {
        "all": 3 * _pass(cells * c + out, work, rates) + laid * ELEMENT / rates.memory,
        "visible": 3 * _pass(rows + taps, visible_ratio * work, rates)
        + (copied * ELEMENT + tables) / rates.memory
        + (out + 3 * taps) * ELEMENT / rates.rows  # summed forward, gathered backward
        + TABLE_LAUNCHES * rates.launch,
    }


def _pass(numbers: float, flops: float, rates: DecoderRates) -> float:
    return max(numbers * ELEMENT / rates.memory, flops / rates.products)
