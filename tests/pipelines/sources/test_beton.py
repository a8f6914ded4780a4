"""A .beton without FFCV: found, opened, read record by record, and refused when it is damaged."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sources.beton import (
    CHECKS,
    JPEG,
    RAW,
    BetonSource,
    checks_path,
    find_beton,
    sealed_checks,
)
from spark_fast.pipelines.sources.shard_format import BETON
from spark_fast.pipelines.transforms.decode import decode_image
from tests.pipelines.damage import flip
from tests.pipelines.pictures import jpeg, picture

RAW_PIXELS = picture(2, 5, 7)
RECORDS = [(jpeg(0), 3, JPEG), (RAW_PIXELS.tobytes(), 1, RAW), (jpeg(1, 30, 40), 0, JPEG)]  # content, label, mode


def handmade(folder: Path, records: list[tuple[bytes, int, int]] = RECORDS) -> Path:
    """A file laid out as FFCV's: tables, records, a table; with the checks beside it."""
    path, tables = folder / BETON, b"FFCV's header and tables".ljust(100, b".")
    checks = np.zeros(len(records), CHECKS)
    content = tables
    for i, (data, label, mode) in enumerate(records):
        height, width = decode_image(data).pixels.shape[:2] if mode == JPEG else RAW_PIXELS.shape[:2]
        checks[i] = (len(content), len(data), zlib.crc32(data), label, height, width, mode)
        content += data
    path.write_bytes(content + b"a" * 24 * len(records))
    with path.open("rb") as file:
        checks_path(path).write_bytes(sealed_checks(checks, file))
    return path


def test_records_are_read_as_files_with_their_labels(tmp_path):
    source = BetonSource(handmade(tmp_path))
    assert (len(source), source.labels.tolist()) == (3, [3, 1, 0])
    assert [source.read(0), source.read(2)] == [RECORDS[0][0], RECORDS[2][0]]
    assert (decode_image(source.read(1)).pixels == RAW_PIXELS).all()
    assert (source.name(2), source.fingerprint()) == ("images.beton:2", "")
    source.close()
    unlabelled = BetonSource(handmade(tmp_path, [(data, -1, mode) for data, _, mode in RECORDS]))
    assert unlabelled.labels is None
    unlabelled.close()


def test_a_damaged_record_is_an_error_of_its_image_and_damaged_tables_of_the_file(tmp_path):
    path = handmade(tmp_path)
    flip(path, 100 + len(RECORDS[0][0]) + 3)
    source = BetonSource(path)
    assert source.read(0) == RECORDS[0][0]
    with pytest.raises(ImageError, match=r"checksum differs, the \.beton is damaged"):
        source.read(1)
    os.truncate(path, 300)
    with pytest.raises(ImageError, match=r"images\.beton was truncated while in use"):
        source.read(2)
    source.close()
    with pytest.raises(DataError, match=r"300 bytes with its last record ending at \d+, is damaged or truncated"):
        BetonSource(path)
    flip(handmade(tmp_path), 5)
    with pytest.raises(DataError, match="is damaged or truncated, or"):
        BetonSource(path)


@pytest.mark.parametrize("written", ["by hand", pytest.param("by FFCV", marks=pytest.mark.ffcv)])
def test_without_its_checks_or_with_damaged_ones_it_is_refused(tmp_path, beton_folder, written):
    path = handmade(tmp_path) if written == "by hand" else beton_folder() / BETON
    good = checks_path(path).read_bytes()
    for bad in (b"", b"garbage", good[:100], good[:-5]):
        checks_path(path).write_bytes(bad)
        with pytest.raises(DataError, match=r"images\.beton\.npy is damaged"):
            BetonSource(path)
    checks_path(path).unlink()
    with pytest.raises(DataError, match=r"images\.beton\.npy, the checksums of .*, is missing"):
        BetonSource(path)


def test_where_there_is_none_the_converter_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is none at .*--format ffcv"):
        find_beton(tmp_path)
