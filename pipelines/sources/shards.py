"""Random access to converted shards.

Read with `pread` rather than through a memory map: a shard that is cut short or lies on a failing disk
then gives an error that names the record, where a memory map would kill the process with SIGBUS. The
checksum of each image is compared on reading, since zeroed bytes inside a JPEG's scan decode without an error.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.shard_format import (
    MANIFEST,
    Manifest,
    ShardFile,
    read_index,
    read_manifest,
    read_record,
)
from spark_fast.pipelines.transforms.bands.statistics import Statistics


class ShardSource:
    """The images of a folder of shards; 24 bytes of memory an image."""

    folder: Path | str

    def __init__(self, folder: Path) -> None:
        """Open `folder`; DataError when a shard is missing, has another size, or the manifest is unusable."""
        manifest = read_manifest(folder)
        self.folder = folder
        self._describe(manifest, read_index(folder, manifest))
        _check_open_files(manifest, folder)
        self._open_shards()

    def _describe(self, manifest: Manifest, index: NDArray[np.void]) -> None:
        """Take over what is known without the shards."""
        self._index = index
        self.classes = manifest.classes
        self.max_pixels = manifest.max_pixels
        self.in_chans = manifest.in_chans  # of images stored losslessly; 0: the records are JPEGs
        self.statistics = {scale: Statistics.from_dict(found) for scale, found in manifest.statistics.items()}
        self._listing = manifest.listing
        self.labels: NDArray[np.int32] | None = self._index["label"].copy() if manifest.labelled else None
        self.files = manifest.shards

    def _open_shards(self) -> None:
        self._files: list[BinaryIO] = []
        for shard in self.files:
            self._files.append(_open_shard(Path(self.folder), shard))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open_shards()

    def __len__(self) -> int:
        return len(self._index)

    def sizes(self) -> NDArray[np.uint32]:
        """Bytes of each image, (n,)."""
        return self._index["size"]

    def shards(self) -> NDArray[np.uint32]:
        """Number of the shard that holds each image, (n,)."""
        return self._index["shard"]

    def disk_order(self) -> NDArray[np.int64]:
        """The samples as they lie in the shards, (n,)."""
        return np.lexsort((self._index["offset"], self._index["shard"]))

    def read(self, i: int) -> bytes:
        """The JPEG or .npy of sample i; ImageError when the shard was cut short or changed while in use."""
        row = self._index[i]
        return read_record(self._files[row["shard"]], self.files[row["shard"]].file, row, int(row["offset"]))

    def name(self, i: int) -> str:
        """Shard and member, as `tar -t` lists it."""
        row = self._index[i]
        return f"{self.files[row['shard']].file}:{member_name(self._files[row['shard']], row)}"

    def fingerprint(self) -> str:
        """Of what was converted."""
        return self._listing

    def close(self) -> None:
        """Close the shards."""
        for file in self._files:
            file.close()


def member_name(file: BinaryIO, row: NDArray[np.void]) -> str:
    """The name of an image in its tar header; `row` is its index row, a scalar."""
    header = os.pread(file.fileno(), 100, int(row["offset"]) - 512)
    return header.split(b"\0")[0].decode("ascii", "backslashreplace")


def _open_shard(folder: Path, shard: ShardFile) -> BinaryIO:
    path = folder / shard.file
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{folder / MANIFEST} lists {shard.file}, which cannot be read: {error}") from error
    size = os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        file.close()
        raise DataError(
            f"{path} has {size} bytes, {MANIFEST} says {shard.bytes}: it was truncated or changed."
            " Copy it again, or delete it and convert again."
        )
    return file


def _check_open_files(manifest: Manifest, folder: Path) -> None:
    needed = len(manifest.shards) + 256  # the rest of the program needs some, too
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise DataError(
            f"{folder} has {len(manifest.shards)} shards, each an open file, but this process may open only"
            f" {limit}: run `ulimit -n {needed}` first"
        )
