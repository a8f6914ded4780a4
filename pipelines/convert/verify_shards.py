"""Read converted data again: does every byte agree with manifest, index and checksums?"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError, ImageError
from spark_fast.files import file_sha256
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.shard_format import (
    JPG,
    NPY,
    BetonFiles,
    Manifest,
    Record,
    ShardFile,
    dali_index,
    read_index,
    read_manifest,
)
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.decode import decode_image


def verify_shards(folder: Path, workers: int = 1) -> list[str]:
    """What is wrong with the shards and the .beton in `folder`, one line a fault, naming file and record.

    Raises DataError when there is no usable manifest or index to compare with.
    """
    manifest = read_manifest(folder)
    beton = list(_beton_faults(folder, manifest, manifest.beton, workers)) if manifest.beton else []
    if manifest.beton and manifest.beton.alone:
        return beton
    index = read_index(folder, manifest)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(
            lambda number: list(_shard_faults(folder, manifest, number, index)), range(len(manifest.shards))
        )
        return [fault for faults in found for fault in faults] + beton


def _beton_faults(folder: Path, manifest: Manifest, made: BetonFiles, workers: int) -> Iterator[str]:
    try:
        for file in (made.data, made.checks):
            if file_sha256(folder / file.file) != file.sha256:
                yield f"{file.file}: sha256 differs from the manifest's"
        source = BetonSource(folder / made.data.file)
    except (OSError, DataError) as error:
        yield f"{made.data.file}: cannot be read: {error}"
        return

    def fault(i: int) -> str | None:
        try:
            size = decode_image(source.read(i), manifest.max_pixels).pixels.shape[:2]
        except (ImageError, OSError) as error:
            return str(error)
        row = source.checks[i]
        return None if size == (row["height"], row["width"]) else "the image has another size"

    if len(source) != made.data.count:
        yield f"{made.checks.file}: has {len(source)} records, the manifest says {made.data.count}"
    with ThreadPoolExecutor(workers) as pool:
        for i, found in enumerate(pool.map(fault, range(len(source)))):
            if found:
                yield f"{made.data.file}, record {i} at byte {source.checks[i]['ptr']}: {found}"
    source.close()


def _shard_faults(folder: Path, manifest: Manifest, number: int, index: NDArray[np.void]) -> Iterator[str]:
    shard = manifest.shards[number]
    rows = np.sort(index[index["shard"] == number], order="offset")
    if len(rows) != shard.count:
        yield f"{shard.file}: the index has {len(rows)} records, the manifest says {shard.count}"
    try:
        if file_sha256(folder / shard.file) != shard.sha256:
            yield f"{shard.file}: sha256 differs from the manifest's"
        data = (folder / shard.file).read_bytes()
    except OSError as error:
        yield f"{shard.file}: cannot be read: {error}"
        return
    for row in rows:
        if fault := _record_fault(data, row, manifest):
            yield f"{shard.file}, record at byte {row['offset']} ({_member(data, row)}): {fault}"
    yield from _tar_faults(folder, shard, rows, NPY if manifest.in_chans else JPG)


def _member(data: bytes, row: np.void) -> str:
    start = int(row["offset"]) - 512
    return data[start : start + 100].split(b"\0")[0].decode("ascii", "backslashreplace")


def _record_fault(data: bytes, row: np.void, manifest: Manifest) -> str | None:
    image = data[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
    if len(image) != row["size"]:
        return "cut short"
    if zlib.crc32(image) != row["crc"]:
        return "checksum differs"
    try:
        if manifest.in_chans:
            decode_bands(image, Expected(manifest.in_chans, manifest.max_pixels))
        else:
            decode_image(image, manifest.max_pixels)
    except ImageError as error:
        return str(error)
    return None


def _tar_faults(folder: Path, shard: ShardFile, rows: NDArray[np.void], image: str) -> Iterator[str]:
    """Compare the tar's own directory, and the .idx, with our index."""
    records, labels = [], {}
    try:
        with tarfile.open(folder / shard.file) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == image:
                    records.append((key, member.offset_data, member.size))
                elif content := tar.extractfile(member):
                    labels[key] = int(content.read())
        idx = (folder / shard.file).with_suffix(".idx").read_text(encoding="utf-8")
    except (OSError, ValueError, tarfile.TarError) as error:
        yield f"{shard.file}: not readable as a tar with index: {error}"
        return
    found = [(offset, size, labels.get(key, -1)) for key, offset, size in records]
    if found != [(int(r["offset"]), int(r["size"]), int(r["label"])) for r in rows]:
        yield f"{shard.file}: members or labels differ from the index"
    expected = [Record(0, key, labels.get(key, -1), offset, size, 0) for key, offset, size in records]
    if idx != dali_index(expected, image):
        yield f"{Path(shard.file).with_suffix('.idx')}: does not fit its shard"
