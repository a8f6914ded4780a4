"""The judge of scans against libjpeg, in the chroma layouts that both know."""

from __future__ import annotations

import random

import pytest
import simplejpeg

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.jpeg import _without_fast_route
from spark_fast.pipelines.transforms.jpeg_scans import find_spare_bytes
from tests.pipelines.layouts import KNOWN, layout_jpeg, scan_start


def libjpeg_warns(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(_without_fast_route(data))
    except ValueError:
        return True
    return False


def judge_refuses(data: bytes) -> bool:
    try:
        begin, end = find_spare_bytes(data)
    except ImageError:
        return True
    return begin < end


@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("layout", KNOWN)
def test_scans_are_judged_as_libjpeg_judges_them(layout, progressive, restarts):
    data = layout_jpeg(layout, progressive=progressive, restarts=restarts)
    assert not judge_refuses(data)
    rng = random.Random(layout)
    for _ in range(12):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(scan_start(data), len(data) - 2)] = rng.randrange(256)
        assert judge_refuses(bytes(damaged)) == libjpeg_warns(bytes(damaged))
    assert judge_refuses(data[:-40] + data[-2:])


def test_where_spare_bytes_begin_and_end():
    data = layout_jpeg("3x1,1x1,1x1")
    assert find_spare_bytes(data) == (len(data) - 2, len(data) - 2)
    assert find_spare_bytes(data[:-2] + bytes(9) + data[-2:] + b"appendix") == (len(data) - 2, len(data) + 7)


def test_an_arithmetic_or_lossless_scan_of_such_a_layout_is_not_judged_and_so_refused():
    data = layout_jpeg("3x1,1x1,1x1").replace(b"\xff\xc0", b"\xff\xc9")
    with pytest.raises(ImageError, match="chroma layout 3x1,1x1,1x1 can be read only if it is Huffman-coded"):
        find_spare_bytes(data)


def test_a_file_of_endless_scans_is_refused():
    data = layout_jpeg("3x1,1x1,1x1", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2].replace(b"\x01\x3f\0", b"\x01\x3f\x10", 1)  # refined again and again
    with pytest.raises(ImageError, match="inconsistent progression sequence"):
        find_spare_bytes(data[:-2] + scan + data[-2:])
    dc = data[data.index(b"\xff\xda") : data.index(b"\xff\xda", scan_start(data))]
    with pytest.raises(ImageError, match="more than 100 scans"):
        find_spare_bytes(data[:-2] + dc * 100 + data[-2:])
