"""The format of converted data: tar shards, how they are written, and the manifest that makes them valid.

    shard-000000.tar    members <key>.jpg and <key>.cls (no .cls for unlabelled data): WebDataset's layout;
                        <key>.npy where images are stored losslessly, of any number of channels
    shard-000000.idx    offsets of the members: the index of DALI's webdataset reader (as by its wds2idx)
    index.npy           one INDEX row per image, for random access, in the order of the source's listing
    manifest.json       written last: a folder without it is an unfinished conversion; begins with its own checksum

Sample i of the converted data is the i-th readable image of the source, although the shards hold them in
shuffled order (for readers that can only read in sequence). So training on shards reads the same images
in the same order, with the same ids, as training on the folder they came from.

Bytes are a function of the samples: no times, no users. Files appear under their names only when whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.commands import command
from spark_fast.errors import DataError, ImageError
from spark_fast.files import atomic_write
from spark_fast.pipelines.transforms.decode import MAX_PIXELS

FORMAT = 2
MANIFEST = "manifest.json"
INDEX_FILE = "index.npy"
BETON = "images.beton"
JPG, NPY = "jpg", "npy"  # of the records: photographs; images of any channels and depth
# offset and size of the image in its shard, label (-1: none), number of the shard, CRC-32 of the image
INDEX = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("shard", "<u4"), ("crc", "<u4")])

_BLOCK = 512  # of tar: headers take one, contents are padded to whole ones


class Record(NamedTuple):
    """One image in a shard."""

    number: int  # of the image in the source's listing
    key: str  # name in the tar, without the suffix
    label: int  # -1: none
    offset: int  # of the image's first byte
    size: int
    crc: int


@dataclass(frozen=True)
class ShardFile:
    """What the manifest knows of a shard (or of the index: count 0)."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BetonFiles:
    """What the manifest knows of the .beton that was made of the shards."""

    raw: float  # share of the records stored as pixels
    alone: bool  # the shards were deleted
    data: ShardFile
    checks: ShardFile


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    count: int
    labelled: bool
    classes: list[str]
    made_from: dict[str, object]  # settings, and what identifies the source's listing
    index: ShardFile
    shards: list[ShardFile]
    repaired: list[dict[str, str]] = field(default_factory=list)  # name, reason
    refused: list[dict[str, str]] = field(default_factory=list)
    losses: list[dict[str, str | int]] = field(default_factory=list)  # `LossCount`s; left out of the file where none
    beton: BetonFiles | None = None
    statistics: dict[str, dict] = field(
        default_factory=dict
    )  # of images stored losslessly, by `--scale`; else left out
    format: int = FORMAT

    @property
    def max_pixels(self) -> int:
        """How many pixels an image may have had."""
        images = self.made_from.get("images")
        return int(images.get("max_pixels", MAX_PIXELS)) if isinstance(images, dict) else MAX_PIXELS

    @property
    def in_chans(self) -> int:
        """Channels of images that are stored losslessly, in .npy records; 0: the records are JPEGs."""
        images = self.made_from.get("images")
        return int(images.get("in_chans", 0)) if isinstance(images, dict) else 0

    @property
    def listing(self) -> str:
        """The fingerprint of the source's listing, "" if it is not known."""
        return str(self.made_from.get("listing", ""))


def shard_name(number: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{number:06d}.tar"


def record_key(number: int, name: str) -> str:
    """A key, unique by number, that any tar reader and WebDataset (where a dot ends it) accept.

    Of a long name the beginning is kept, of a tile's its place as well.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)
    place = re.search(r"(-y\d+-x\d+)?$", stem)[0]  # type: ignore[index]  # it always matches
    return f"{number:08d}-{stem[: len(stem) - len(place)][: 60 - len(place)]}{place}"


def write_shard(
    path: Path, samples: Iterable[tuple[int, str, int, bytes]], suffix: str = JPG
) -> tuple[ShardFile, list[Record]]:
    """Write (number, name, label, image) samples to a tar and its .idx; `suffix` of the images. Raises OSError."""
    records = []
    sha256 = hashlib.sha256()
    size = 0
    with atomic_write(path) as file:

        def write(data: bytes) -> None:
            nonlocal size
            file.write(data)
            sha256.update(data)
            size += len(data)

        for number, name, label, image in samples:
            key = record_key(number, name)
            records.append(Record(number, key, label, size + _BLOCK, len(image), zlib.crc32(image)))
            of_label = _member(f"{key}.cls", str(label).encode()) if label >= 0 else b""
            write(_member(f"{key}.{suffix}", image) + of_label)
        write(bytes(2 * _BLOCK + -(size + 2 * _BLOCK) % tarfile.RECORDSIZE))  # the end mark
    with atomic_write(path.with_suffix(".idx")) as file:
        file.write(dali_index(records, suffix).encode())
    return ShardFile(path.name, len(records), size, sha256.hexdigest()), records


# Of a file: user 0, time 0. Name, size and checksum (for which its own field counts as spaces) are filled in.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_HEADER = b"".join((_HEADER[:148], b" " * 8, _HEADER[156:]))


def _member(name: str, content: bytes) -> bytes:
    """A file as it lies in a tar: header, content, padding. tarfile's bytes in a sixth of its time."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()  # shorter than its 100 bytes: see record_key
    header[124:135] = b"%011o" % len(content)
    header[148:155] = b"%06o\0" % sum(header)
    return b"".join((header, content, bytes(-len(content) % _BLOCK)))


def dali_index(records: Iterable[Record], suffix: str = JPG) -> str:
    """The .idx of a shard: `v1.2 count`, then per sample `suffix offset size name` of each member."""
    lines = []
    for r in records:
        line = f"{suffix} {r.offset} {r.size} {r.key}.{suffix}"
        if r.label >= 0:
            after = r.offset + -(-r.size // _BLOCK) * _BLOCK + _BLOCK  # the image's padding, the next header
            line += f" cls {after} {len(str(r.label))} {r.key}.cls"
        lines.append(line + "\n")
    return f"v1.2 {len(lines)}\n" + "".join(lines)


def read_record(file: BinaryIO, name: str, row: NDArray[np.void], offset: int, kind: str = "shard") -> bytes:
    """The bytes at `offset` of `file`, the `kind` called `name`: as many as `row`, a scalar with size and crc, says.

    Raises ImageError when the file was cut short or the checksum differs.
    """
    size = int(row["size"])
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ImageError(f"{name} was truncated while in use")
    if zlib.crc32(data) != row["crc"]:
        raise ImageError(f"checksum differs, the {kind} is damaged: see {command('convert')} --verify")
    return data


def write_index(path: Path, shards: Iterable[list[Record]]) -> ShardFile:
    """Write index.npy for the records of each shard, sorted by the source's numbers."""
    rows = [(r.number, r.offset, r.size, r.label, shard, r.crc) for shard, rs in enumerate(shards) for r in rs]
    rows.sort()
    index = np.array([row[1:] for row in rows], dtype=INDEX)
    buffer = io.BytesIO()
    np.save(buffer, index)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
    return ShardFile(path.name, 0, buffer.tell(), hashlib.sha256(buffer.getbuffer()).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare the conversion in `folder` finished."""
    content = asdict(manifest)
    if not manifest.losses:
        del content["losses"]  # versions before know of none
    if not manifest.statistics:
        del content["statistics"]
    with atomic_write(folder / MANIFEST) as file:
        file.write(sealed(json.dumps(content, indent=1).encode()))


def sealed(text: bytes) -> bytes:
    """A JSON object, with the sha256 of the rest of its text as the first entry."""
    return b'{\n "sha256": "%s",' % hashlib.sha256(text[1:]).hexdigest().encode() + text[1:]


def is_sealed(text: bytes) -> bool:
    """Whether `sealed` made this very text."""
    return text == sealed(b"{" + text[len(sealed(b"{")) :])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; DataError when it cannot be read, or what `parse_manifest` says."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """The manifest in the file `path`; DataError when it is damaged, of another version or names odd files."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} has format {content['format']}, this version reads format {FORMAT}:"
                " convert again, or install the version that wrote it"
            )
        if not is_sealed(text):
            raise ValueError("its own checksum differs")
        content.pop("sha256", None)
        content["index"] = ShardFile(**content["index"])
        content["shards"] = [ShardFile(**shard) for shard in content["shards"]]
        if beton := content.get("beton"):
            beton |= {part: ShardFile(**beton[part]) for part in ("data", "checks")}
            content["beton"] = BetonFiles(**beton)
        manifest = Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): convert again with --overwrite") from error
    files = [manifest.beton.data, manifest.beton.checks] if manifest.beton else []
    for file in [manifest.index, *manifest.shards, *files]:
        if not re.fullmatch(r"[\w-][\w.-]*", file.file):
            raise DataError(f"{path} names a file outside its folder: {file.file!r}. Do not use this data.")
    if sum(shard.count for shard in manifest.shards) != manifest.count:
        raise DataError(f"{path} is damaged: the counts of its shards do not add up to {manifest.count}")
    return manifest


def read_index(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    """The INDEX rows, (count,), checked against the manifest; DataError when they do not belong to it."""
    path = folder / manifest.index.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return parse_index(content, manifest, path)


def parse_index(content: bytes, manifest: Manifest, path: Path | str) -> NDArray[np.void]:
    """The INDEX rows in the file `path`, (count,); DataError when they do not belong to the manifest."""
    if hashlib.sha256(content).hexdigest() != manifest.index.sha256:
        raise DataError(f"{path} does not belong to {MANIFEST} (sha256 differs): convert again")
    index = np.load(io.BytesIO(content), allow_pickle=False)
    sizes = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)
    if (
        index.dtype != INDEX
        or index.shape != (manifest.count,)
        or (index["shard"] >= len(sizes)).any()
        or (index["offset"] + index["size"] > sizes[index["shard"]]).any()
    ):
        raise DataError(f"{path} does not fit the shards that {MANIFEST} lists: convert again")
    return index
