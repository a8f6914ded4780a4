"""What is checked of a checkpoint file before it is opened, so that a hostile or damaged one costs nothing.

`torch.load(weights_only=True)` runs no code, but it decompresses what it is given, believes sizes, and checks no
checksum. So the frame is read by hand first, in a few kilobytes of memory: torch and safetensors never compress, and
lay tensors side by side, so that an honest file claims no more bytes than it has.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

DIRECTORY_LIMIT = 4 << 20  # bytes of a zip's directory; the largest ConvNet of timm with LAMB's state needs 0.3 MB
PICKLE_LIMIT = 2 << 20  # bytes of data.pkl, which may grow seventyfold in memory; the same network needs 0.55 MB
HEADER_LIMIT = 4 << 20  # bytes of a safetensors header
CHUNK = 1 << 20


class RefusedError(Exception):
    """What is wrong with a file, to be read after its name."""


def sidecar(path: Path) -> Path:
    """Where the SHA-256 of a checkpoint lies: beside the file itself, where `path` is a link to it."""
    path = path.resolve()
    return path.with_name(path.name + ".sha256")


def check_sha256(path: Path) -> bool:
    """Compare a file with the SHA-256 beside it; False where none lies there.

    Raises:
        RefusedError: they differ.
    """
    if not sidecar(path).exists():
        return False
    expected = re.match(rb"[0-9a-f]{64}(?=\s)", sidecar(path).read_bytes()[:100])
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            sha256.update(part)
    if expected is None or sha256.hexdigest() != expected[0].decode():
        raise RefusedError(f"is damaged: its SHA-256 differs from the one in {sidecar(path).name}")
    return True


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file whose header is too long.

    Raises:
        RefusedError: longer than the file, or than any network needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > size - 8:
        raise RefusedError(f"is damaged: it claims a header of {header} bytes and has {size} in all")
    if header > HEADER_LIMIT:
        raise RefusedError(f"was not loaded: its safetensors header has {header} bytes")


def check_zip(path: Path, crc: bool) -> None:
    """Refuse what is no plain zip of torch.

    Args:
        crc: also read it through and compare the zip's own checksums, which torch.load does not.

    Raises:
        RefusedError: another format, compressed or overlapping records, a header beyond all measure, a wrong checksum.
    """
    size = path.stat().st_size
    directory = _directory_bytes(path, size)
    if directory is None:
        raise RefusedError(
            "cannot be read: it is damaged, or was saved by a torch before 1.6 (then load it and torch.save it again)"
        )
    if directory > DIRECTORY_LIMIT:
        raise RefusedError(f"was not loaded: its zip directory has {directory} bytes")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise RefusedError(f"is damaged: {error}") from None
    records = archive.infolist()
    names = {record.filename.partition("/")[2] for record in records}
    if "constants.pkl" in names:
        raise RefusedError(
            "is a TorchScript archive, which holds code. Save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if any(r.compress_type != zipfile.ZIP_STORED or r.compress_size != r.file_size for r in records):
        raise RefusedError("was not loaded: its records are compressed, which torch never does (a zip bomb?)")
    if sum(r.file_size for r in records) > size or len({r.filename for r in records}) != len(records):
        raise RefusedError(f"was not loaded: its records overlap or claim more than the file's {size} bytes")
    for record in records:
        if record.filename.endswith(".pkl") and record.file_size > PICKLE_LIMIT:
            raise RefusedError(
                f"was not loaded: its {record.filename} has {record.file_size} bytes, more than any state dict needs"
            )
    damaged = archive.testzip() if crc else None
    if damaged is not None:
        raise RefusedError(f"is damaged: the checksum of {damaged} does not match")


def _directory_bytes(path: Path, size: int) -> int | None:
    """The length of a zip's directory by its end record, None where there is none; `zipfile` would read it whole."""
    with path.open("rb") as file:
        start = max(0, size - 22 - 20 - 0xFFFF)  # end record, zip64 locator, longest comment
        file.seek(start)
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) < end + 22:
            return None
        length = int.from_bytes(tail[end + 12 : end + 16], "little")
        locator = tail[max(0, end - 20) : end]
        if locator[:4] == b"PK\6\7":  # zip64, as torch writes beyond 4 GB
            file.seek(int.from_bytes(locator[8:16], "little"))
            length = max(length if length != 0xFFFFFFFF else 0, int.from_bytes(file.read(56)[40:48], "little"))
    return length
