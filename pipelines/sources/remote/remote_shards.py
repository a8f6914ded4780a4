"""Random access to converted shards on a server, by way of the cache.

Manifest and index come first. A shard is fetched when an image of it is first asked for, unless `prefetch` has been
quicker. A cached shard is opened for each image: the others of this machine may remove it at any time, and that frees
its space at once. So a source holds no open file, and may be pickled to other processes, which share the cache.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spark_fast.commands import command
from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sources.remote.server import DamagedError, Server, StoppedError
from spark_fast.pipelines.sources.remote.shard_cache import ShardCache, check_arrived
from spark_fast.pipelines.sources.remote.url import refuse_credentials
from spark_fast.pipelines.sources.shard_format import (
    MANIFEST,
    Manifest,
    ShardFile,
    is_sealed,
    parse_index,
    parse_manifest,
    read_record,
)
from spark_fast.pipelines.sources.shards import ShardSource, member_name

logger = logging.getLogger("spark_fast.pipelines")

GB = 10**9
TOLD = 5  # downloads that the log has each; then every hundredth
TELL_SECONDS = 10.0  # between two words on one of them
REOPENED = 5  # times that an image's shard may be removed by others just after it came


class RemoteShardSource(ShardSource):
    """The images of a folder of shards at a URL; `window`: checksums of the shards that are needed next."""

    def __init__(self, url: str, split: str, cache: ShardCache) -> None:
        """Read manifest and index of a split: from the folder of its name, for "train" and "all" from the URL itself.

        Raises:
            DataError: they cannot be read, or are unusable.
            SettingsError: what reads such a URL is not installed, or the URL holds a password.
        """
        refuse_credentials(url)
        self.cache, self.window = cache, frozenset[str]()
        self._start_counting()
        folder, manifest = _find_manifest(url, split)
        self.folder, self._server = folder, Server(folder)
        with self._open(manifest.index) as file:
            self._describe(manifest, parse_index(file.read(), manifest, f"{folder}/{manifest.index.file}"))
        logger.info(
            "%s: %d images in %d shards, %s; at most %s of them in %s",
            folder, len(self), len(self.files), in_gb(self.total_bytes), in_gb(cache.size), cache.folder,
        )  # fmt: skip

    def _start_counting(self) -> None:
        self._closed = threading.Event()
        self._counting, self._count = threading.Lock(), 0
        self.on_close: list[Callable[[], None]] = []  # what else ends with this source

    def __getstate__(self) -> dict[str, object]:
        own = {"_closed", "_counting", "_count", "on_close"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_counting()

    @property
    def total_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.files)

    def read(self, i: int) -> bytes:
        """The JPEG or .npy of sample i, its shard fetched if need be.

        Raises:
            ImageError: the record is not what the index says, although its shard is what the manifest says.
            DataError: the shard cannot be downloaded.
        """
        row = self._index[i]
        shard, offset = self.files[row["shard"]], int(row["offset"])
        try:
            with self._open(shard) as file:
                return read_record(file, shard.file, row, offset)
        except ImageError:
            if not self.cache.drop_damaged(shard):
                raise
        with self._open(shard) as file:
            return read_record(file, shard.file, row, offset)

    def name(self, i: int) -> str:
        """Shard and member, as `tar -t` lists it; its place in the shard where that is not in the cache."""
        row = self._index[i]
        shard = self.files[row["shard"]]
        with suppress(OSError), self.cache.open(shard) as file:
            return f"{shard.file}:{member_name(file, row)}"
        return f"{shard.file}, byte {row['offset']}"

    def close(self) -> None:
        """Stop what is being fetched."""
        self._closed.set()
        for end in self.on_close:
            end()

    def fetch(self, shard: ShardFile, stop: threading.Event | None = None) -> None:
        """Bring a shard to the cache.

        Raises:
            DataError: it cannot be downloaded, or the cache cannot be written.
            StoppedError: `stop` was set, or the source was closed.
        """
        stop = stop or self._closed

        def attempt(path: Path) -> None:
            try:
                self._server.download(shard.file, shard.bytes, path, stop, self._teller(shard))
                check_arrived(shard, path)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    os.truncate(path, 0)
                    self.cache.make_room(self.window)
                    raise OSError(error.errno, f"the disk of the cache {self.cache.folder} is full") from None
                raise

        def download(path: Path) -> None:
            begin = time.monotonic()
            self._server.patiently(shard.file, lambda: attempt(path), stop)
            self._arrived(shard, time.monotonic() - begin)

        with self._usable_cache():
            self.cache.fetch(shard, download, self.window, stop)

    @contextmanager
    def _usable_cache(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"the cache {self.cache.folder} cannot be used: {error}") from None

    def _open(self, shard: ShardFile) -> BinaryIO:
        for _ in range(REOPENED):
            with self._usable_cache(), suppress(FileNotFoundError):
                return self.cache.open(shard)
            try:
                self.fetch(shard)
            except StoppedError:  # this source was closed, or another thread's download was no longer wanted there
                if self._closed.is_set():
                    raise DataError(f"{self.folder} was closed while {shard.file} was being fetched") from None
        raise DataError(
            f"{shard.file} was removed from the cache {self.cache.folder} {REOPENED} times before it could be read:"
            " use a larger --cache_size, or a --cache_dir that no other run uses"
        )

    def _teller(self, shard: ShardFile) -> Callable[[int], None]:
        """What says how far one of the first downloads is."""
        said = time.monotonic()

        def tell(arrived: int) -> None:
            nonlocal said
            if self._count < TOLD and time.monotonic() - said >= TELL_SECONDS:
                said = time.monotonic()
                logger.info("%s: %.0f %% of %s", shard.file, 100 * arrived / max(shard.bytes, 1), in_gb(shard.bytes))

        return tell

    def _arrived(self, shard: ShardFile, seconds: float) -> None:
        with self._counting:
            self._count += 1
            count = self._count
        if count <= TOLD or count % 100 == 0:
            logger.info(
                "fetched %s, %s at %.0f MB/s (file %d of this process)",
                shard.file, in_gb(shard.bytes), shard.bytes / 1e6 / max(seconds, 1e-3), count,
            )  # fmt: skip


def has_split(url: str, split: str) -> bool:
    """Whether there is a folder of shards of this name at a URL. Raises DataError when the server does not say."""
    server = Server(f"{url.rstrip('/')}/{split}")

    def attempt() -> bool:
        try:
            server.read(MANIFEST)
        except FileNotFoundError:
            return False
        return True

    return server.patiently(MANIFEST, attempt)


def in_gb(size: int) -> str:
    """120 MB, 32.1 GB."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.4g} MB"


def _find_manifest(url: str, split: str) -> tuple[str, Manifest]:
    """The folder of a split, and its manifest."""
    url = url.rstrip("/")
    folders = {"train": [url, f"{url}/train"], "all": [url]}.get(split, [f"{url}/{split}"])
    server, servers = Server(url), [(folder, Server(folder)) for folder in folders]

    def attempt() -> tuple[str, bytes]:
        for folder, place in servers:
            with suppress(FileNotFoundError):
                text = place.read(MANIFEST)
                if not is_sealed(text):
                    raise DamagedError(f"{folder}/{MANIFEST} is damaged: its own checksum differs")
                return folder, text
        raise FileNotFoundError(f"there is no {MANIFEST} in {' or '.join(folders)}")

    try:
        folder, text = server.patiently(MANIFEST, attempt)
    except DataError as error:
        raise DataError(
            f"{error}. A data path on a server must be a folder of shards from {command('convert')}, with {MANIFEST};"
            f" searched in {' and '.join(folders)}"
        ) from None
    manifest = parse_manifest(text, f"{folder}/{MANIFEST}")
    if manifest.beton is not None and manifest.beton.alone:
        raise DataError(f"{folder} holds only a .beton, which is not read from a server: copy it, or upload shards")
    return folder, manifest
