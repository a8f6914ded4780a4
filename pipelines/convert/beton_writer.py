"""Write a folder's `.beton` from its shards: one pass over the images serves both formats.

JPEGs are copied byte for byte, so both show the same pixels; a share of the records may be stored raw, which
needs no decoding and six times the space. Bytes are a function of the shards and that share: the records stand
in the order of the shards (already shuffled), and which are raw follows from their numbers. FFCV's own writer
deals records out to processes as these come along, waits for ever when one fails, and publishes unfinished
files; so only its fields and its allocator of pages are used, in one thread, in a file that appears when whole.
"""

from __future__ import annotations

import errno
import io
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from spark_fast.errors import DataError, ImageError, SettingsError
from spark_fast.files import atomic_write, file_sha256
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.sampler import uniform
from spark_fast.pipelines.sources.beton import CHECKS, JPEG, RAW, checks_path, sealed_checks
from spark_fast.pipelines.sources.shard_format import BETON, INDEX_FILE, BetonFiles, Manifest, ShardFile, write_manifest
from spark_fast.pipelines.sources.shards import ShardSource
from spark_fast.pipelines.transforms.decode import decode_image

_PAGE = 8 * 2**20  # FFCV's default; a record never crosses a page

_ALONE = BETON + ".alone"  # the shards in this folder are only a step on the way to a .beton

OnRecord = Callable[[int, int], None]  # images, bytes


@dataclass(frozen=True)
class BetonSettings:
    """How a .beton is made of the shards of a folder."""

    raw: float = 0.0  # share of the records stored as pixels
    alone: bool = False  # the shards are deleted when the .beton is whole

    def __post_init__(self) -> None:
        if not 0 <= self.raw <= 1:
            raise SettingsError(f"ffcv_raw must be from 0 (all JPEG) to 1 (all raw), got {self.raw}")


def mark(folder: Path, alone: bool) -> None:
    """Note, before the shards are written, whether they are to be deleted: shards without the note never are."""
    mark_path = folder / _ALONE
    if alone:
        mark_path.touch()
    else:
        mark_path.unlink(missing_ok=True)


def with_beton(
    folder: Path, manifest: Manifest, settings: BetonSettings | None, workers: int, on_record: OnRecord
) -> Manifest:
    """Make the .beton that `settings` ask for of the finished shards in `folder`; None: only shards are wanted.

    Returns the manifest that lists it. Raises SettingsError when the folder was converted to another format or FFCV is
    missing, DataError when a shard is damaged, OSError when writing fails.
    """
    made = manifest.beton
    if made is not None and made.alone:
        _refuse_to_change(folder, made, settings)
    if settings is None:
        return manifest
    if settings.alone and not (made and made.alone) and not (folder / _ALONE).exists():
        raise SettingsError(
            f"{folder} holds shards, which --format ffcv would delete: use --format both to keep them, another folder,"
            " or --overwrite"
        )
    if made is None or made.raw != settings.raw or not _is_there(folder, made):
        made = _write(folder, settings, workers, on_record)
    manifest = replace(manifest, beton=replace(made, alone=settings.alone))
    write_manifest(folder, manifest)
    if settings.alone:
        for path in [*folder.glob("shard-*"), folder / INDEX_FILE]:
            path.unlink(missing_ok=True)
        mark(folder, alone=False)
    return manifest


def _refuse_to_change(folder: Path, made: BetonFiles, settings: BetonSettings | None) -> None:
    """Raise SettingsError unless `settings` ask for the .beton alone that is there: its shards are gone."""
    if settings is None or not settings.alone:
        raise SettingsError(f"{folder} holds only a .beton, its shards are gone: choose another folder, or --overwrite")
    if made.raw != settings.raw or not _is_there(folder, made):
        raise SettingsError(
            f"{folder} holds only a .beton, with other settings or incomplete: choose another folder, or --overwrite"
        )


def _is_there(folder: Path, made: BetonFiles) -> bool:
    files = (made.data, made.checks)
    return all((folder / f.file).exists() and (folder / f.file).stat().st_size == f.bytes for f in files)


def _write(folder: Path, settings: BetonSettings, workers: int, on_record: OnRecord) -> BetonFiles:
    require_ffcv("writing a .beton")
    source = ShardSource(folder)
    try:
        raw = uniform(0, 0, np.arange(len(source)), 1)[:, 0] < settings.raw
        path = folder / BETON
        with atomic_write(path) as file:
            checks = _write_records(file, source, raw, workers, on_record)
            size, sha256 = file.seek(0, io.SEEK_END), file_sha256(Path(file.name))
            with Path(file.name).open("rb") as written, atomic_write(checks_path(path)) as beside:
                length = beside.write(sealed_checks(checks, written))
            summed = file_sha256(checks_path(path))
    finally:
        source.close()
    return BetonFiles(
        settings.raw,
        settings.alone,
        ShardFile(path.name, len(checks), size, sha256),
        ShardFile(checks_path(path).name, 0, length, summed),
    )


def _write_records(
    file: BinaryIO, source: ShardSource, raw: NDArray[np.bool_], workers: int, on_record: OnRecord
) -> NDArray[np.void]:
    """Write a whole .beton; returns its CHECKS."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )

    fields = {"image": RGBImageField(), "label": IntField()}
    header, described = np.zeros(1, HeaderType), np.zeros(len(fields), FieldDescType)
    numbers = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    for row, (name, field) in zip(described, fields.items(), strict=True):
        row["type_id"] = numbers[type(field)]
        row["name"][: len(name)] = list(name.encode())
        row["arguments"][:] = field.to_binary()[0]
    metadata = np.zeros(len(source), get_metadata_type(list(fields.values())))
    checks = np.zeros(len(source), CHECKS)
    page = _page_size(source, raw)
    before = header.tobytes() + described.tobytes()
    file.write(before + metadata.tobytes())
    file.flush()
    allocator = MemoryAllocator(file.name, file.tell(), page)
    with _Appending(allocator):
        for i, (data, height, width) in _in_shard_order(source, raw, workers):
            allocator.set_current_sample(i)
            ptr, place = allocator.malloc(len(data))
            place[:] = np.frombuffer(data, np.uint8)
            mode = RAW if raw[i] else JPEG
            label = -1 if source.labels is None else source.labels[i]
            metadata["f0"][i] = (mode, width, height, ptr)
            metadata["f1"][i] = label
            checks[i] = (ptr, len(data), zlib.crc32(data), label, height, width, mode)
            on_record(1, len(data))
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page
    header["num_samples"] = len(source)
    header["alloc_table_ptr"] = end = file.seek(0, io.SEEK_END)
    if end != allocator.offset + (allocator.my_page + 1) * page:
        raise OSError(errno.ENOSPC, f"a page of {file.name} was not written whole")
    file.write(np.array(allocator.allocations, ALLOC_TABLE_TYPE).tobytes())
    file.seek(0)
    file.write(header.tobytes() + described.tobytes() + metadata.tobytes())
    file.flush()
    return checks


class _Allocator(Protocol):
    """What is used of FFCV's MemoryAllocator as a context."""

    fp: BinaryIO

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> object: ...


class _Appending:
    """FFCV's allocator as a context that writes no last page after a failure."""

    def __init__(self, allocator: _Allocator) -> None:
        self._allocator = allocator

    def __enter__(self) -> None:
        self._allocator.__enter__()

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._allocator.__exit__(None, None, None)
        else:
            self._allocator.fp.close()


def _page_size(source: ShardSource, raw: NDArray[np.bool_]) -> int:
    """Bytes of a page that the largest record fits into."""
    largest = int(source.sizes().max())
    for i in np.flatnonzero(raw).tolist():
        height, width = _jpeg_size(_read(source, i))
        largest = max(largest, height * width * 3)
    page = _PAGE
    while page < largest:
        page *= 2
    return page


def _in_shard_order(
    source: ShardSource, raw: NDArray[np.bool_], workers: int
) -> Iterator[tuple[int, tuple[bytes, int, int]]]:
    """Number, and (content, height, width), of each record; some records are read and decoded ahead."""

    def load(i: int) -> tuple[bytes, int, int]:
        jpeg = _read(source, i)
        if raw[i]:
            pixels = decode_image(jpeg, source.max_pixels).pixels
            return pixels.tobytes(), *pixels.shape[:2]
        return jpeg, *_jpeg_size(jpeg)

    ahead: deque[tuple[int, Future[tuple[bytes, int, int]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for i in source.disk_order().tolist():
            ahead.append((i, pool.submit(load, i)))
            if len(ahead) > 4 * workers:
                number, loaded = ahead.popleft()
                yield number, loaded.result()
        for number, loaded in ahead:
            yield number, loaded.result()


def _read(source: ShardSource, i: int) -> bytes:
    try:
        return source.read(i)
    except ImageError as error:
        raise DataError(f"{source.folder}, {source.name(i)}: {error}. Convert again with --overwrite.") from error


def _jpeg_size(jpeg: bytes) -> tuple[int, int]:
    return simplejpeg.decode_jpeg_header(jpeg, strict=False)[:2]
