"""Converted data in FFCV's format: `images.beton`, and `images.beton.npy` beside it.

FFCV checks nothing: a damaged JPEG becomes a black image, a file cut short a crash, and it reads wherever its
tables point. So the second file holds one CHECKS row per record, its place and its CRC-32, and ends with the
sha256 of FFCV's tables and of itself; a `.beton` counts only together with it. Record i is sample i of the shards
and of the listing, whatever its place in the file. This reads single records, without FFCV: for the images that
stand in for unreadable ones, for --verify, and for the other backends.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.files import PARTIAL
from spark_fast.pipelines.sources.shard_format import BETON, MANIFEST, read_manifest, read_record

CHECKS = np.dtype(
    [("ptr", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2"),
     ("mode", "u1")]
)  # fmt: skip
JPEG, RAW = 0, 1  # FFCV's modes
_SHA256 = 32  # bytes
_ALLOCATION = 24  # bytes of an entry in FFCV's last table: sample, place, size


def checks_path(beton: Path) -> Path:
    """Where the CHECKS rows of a .beton are."""
    return beton.with_name(beton.name + ".npy")


def sealed_checks(checks: NDArray[np.void], beton: BinaryIO) -> bytes:
    """The file beside an open, whole `beton`: (n,) CHECKS as .npy, sha256 of FFCV's tables, sha256 of all that."""
    buffer = io.BytesIO()
    np.save(buffer, checks)
    content = buffer.getvalue() + _tables_sha256(checks, beton)
    return content + hashlib.sha256(content).digest()


def _tables_sha256(checks: NDArray[np.void], beton: BinaryIO) -> bytes:
    """Of the size of a .beton and of FFCV's tables: all before the first record, and the last bytes."""
    size, last = os.fstat(beton.fileno()).st_size, _ALLOCATION * len(checks)
    digest = hashlib.sha256(b"%d" % size)
    digest.update(os.pread(beton.fileno(), int(checks["ptr"].min()), 0))
    digest.update(os.pread(beton.fileno(), last, max(size - last, 0)))
    return digest.digest()


def find_beton(data_path: str | Path, split: str = "train") -> Path:
    """The .beton of a split at `data_path`: images.beton in the split's folder, for "train" and "all" also the one in
    the folder, or the file itself; DataError when there is none.
    """
    path = Path(data_path).expanduser()
    places = [path / split / BETON] if split != "all" else []
    places += [path / BETON, *([path] if path.suffix == ".beton" else [])] if split in ("train", "all") else []
    found = [p for p in places if p.is_file()]
    if not found:
        raise DataError(
            f"--pipeline ffcv reads a .beton, and there is none at {path}: make one with"
            f" {command('convert')} SRC DST --format ffcv, or use another --pipeline"
        )
    return found[0]


class BetonSource:
    """The records of a .beton as encoded images; 25 bytes of memory an image."""

    def __init__(self, path: Path) -> None:
        """Open `path`; DataError when it or its checks are missing, cut short or do not fit each other."""
        self.path = path
        self.checks, tables = _read_checks(path)
        self.classes: list[str] = []
        self.labels: NDArray[np.int32] | None = None
        if (self.checks["label"] >= 0).all():
            self.labels = self.checks["label"].astype(np.int32)
        self._open()
        if _tables_sha256(self.checks, self._file) != tables:
            size, end = self.size(), int((self.checks["ptr"] + self.checks["size"]).max())
            self.close()
            raise DataError(
                f"{path}, {size} bytes with its last record ending at {end}, is damaged or truncated, or"
                f" {checks_path(path).name} belongs to another file: copy both again, or convert again"
            )

    def _open(self) -> None:
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error}") from error

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.checks)

    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self._file.fileno()).st_size

    def read(self, i: int) -> bytes:
        """The JPEG of sample i, or its raw pixels as a PPM; ImageError when they are not what was written."""
        row = self.checks[i]
        data = read_record(self._file, self.path.name, row, int(row["ptr"]), ".beton")
        if row["mode"] == RAW:
            return b"P6\n%d %d\n255\n" % (row["width"], row["height"]) + data
        return data

    def name(self, i: int) -> str:
        """File and record."""
        return f"{self.path.name}:{i}"

    def fingerprint(self) -> str:
        """Of what was converted; "" without its manifest."""
        folder = self.path.parent
        return read_manifest(folder).listing if (folder / MANIFEST).exists() else ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_checks(beton: Path) -> tuple[NDArray[np.void], bytes]:
    """The CHECKS rows, and the sha256 of FFCV's tables."""
    path = checks_path(beton)
    if not beton.exists() and beton.with_name(beton.name + PARTIAL).exists():
        raise DataError(f"{beton} was not finished: run {command('convert')} again with the same settings")
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path.name}, the checksums of {beton}, is missing, so damage would go unnoticed: copy both, or"
            f" make them with {command('convert')} --format ffcv"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    content, seal = whole[:-_SHA256], whole[-_SHA256:]
    if hashlib.sha256(content).digest() != seal:
        raise DataError(f"{path} is damaged or of another version: copy it again, or convert again")
    checks = np.load(io.BytesIO(content), allow_pickle=False)
    if checks.dtype != CHECKS or checks.ndim != 1 or not len(checks) or checks["mode"].max() > RAW:
        raise DataError(f"{path} is of another version: convert again")
    return checks, content[-_SHA256:]
