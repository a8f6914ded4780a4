"""Shards on the local disk, at most so many bytes of them, shared by all processes of a machine.

    <sha256>                   a whole file, checked; its time of change is that of its last use
    <sha256>.<bytes>.partial   one on its way; its bytes are counted in full
    <sha256>.claim             locked by the process that fetches it: gone with the process, however it ends
    lock                       held for as long as it takes to count and to make room

A name is the content's checksum. So nothing in here is ever out of date, and data sets on several servers share what
is the same. A file is not synced to the disk: after a power failure the checksum of a record tells, and the file is
fetched again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from spark_fast.files import PARTIAL, file_sha256
from spark_fast.pipelines.sources.remote.server import DamagedError, StoppedError
from spark_fast.pipelines.sources.shard_format import ShardFile

logger = logging.getLogger("spark_fast.pipelines")

_WHOLE = re.compile(r"[0-9a-f]{64}")
_ARRIVING = re.compile(rf"([0-9a-f]{{64}})\.(\d+){re.escape(PARTIAL)}")
_POLL = 0.05  # seconds between two looks at what another process fetches
_TOUCH = 30.0  # seconds within which a file counts as used once


class _Cached(NamedTuple):
    used: float
    bytes: int
    name: str


def default_folder() -> Path:
    """Where shards are kept unless it is said: $XDG_CACHE_HOME/spark_fast/shards, in ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "spark_fast", "shards")


class ShardCache:
    """Files by their checksum in `folder`, at most `size` bytes of them."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._arriving: dict[str, Future[None]] = {}  # what a thread of this process fetches: the others wait for it
        self._guard = threading.Lock()
        self._touched: dict[str, float] = {}

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int]]:
        return ShardCache, (self.folder, self.size)

    def open(self, shard: ShardFile) -> BinaryIO:
        """The file of a shard, which now counts as used. Raises FileNotFoundError when it is not here."""
        path = self.folder / shard.sha256
        file = path.open("rb", buffering=0)
        if os.fstat(file.fileno()).st_size != shard.bytes:  # cut short by hand, or by a power failure
            file.close()
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        now = time.monotonic()
        if now - self._touched.get(shard.sha256, -_TOUCH) >= _TOUCH:
            self._touched[shard.sha256] = now
            with suppress(OSError):  # it may have been removed since, which the open file does not mind
                os.utime(path)
        return file

    def holds(self, shard: ShardFile) -> bool:
        """Whether it is here."""
        return (self.folder / shard.sha256).exists()

    def drop_damaged(self, shard: ShardFile) -> bool:
        """Remove the file of a shard if it is not what the manifest says; whether it was."""
        path = self.folder / shard.sha256
        try:
            if file_sha256(path) == shard.sha256:
                return False
        except FileNotFoundError:
            return True
        logger.warning("%s in the cache %s is damaged: it is downloaded again", shard.file, self.folder)
        path.unlink(missing_ok=True)
        return True

    def fetch(
        self,
        shard: ShardFile,
        download: Callable[[Path], None],
        keep: Collection[str] = (),
        stop: threading.Event | None = None,
    ) -> None:
        """Have a shard here: by `download`, which writes it to a path, unless another thread or process is at it.

        Args:
            keep: checksums of the files that are the last to be removed for it.
            stop: set when nobody waits for it any more.

        Raises:
            StoppedError: `stop` was set.
            OSError: the disk refuses.
            Exception: what `download` raised. Nothing of the file is left then.
        """
        with self._guard:
            theirs = self._arriving.get(shard.sha256)
            ours = self._arriving.setdefault(shard.sha256, Future())
        if theirs is not None:
            return theirs.result()
        try:
            self._fetch(shard, download, keep, stop or threading.Event())
            ours.set_result(None)
        except BaseException as error:
            ours.set_exception(error)
            raise
        finally:
            with self._guard:
                del self._arriving[shard.sha256]

    def _fetch(
        self, shard: ShardFile, download: Callable[[Path], None], keep: Collection[str], stop: threading.Event
    ) -> None:
        path = self.folder / shard.sha256
        partial = self.folder / f"{shard.sha256}.{shard.bytes}{PARTIAL}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._claimed(shard.sha256, stop) as is_ours:
            if not is_ours:
                return
            try:
                while not self._has_room(partial, shard.bytes, keep):
                    _pause(stop)
                download(partial)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def make_room(self, keep: Collection[str] = ()) -> bool:
        """Remove the file that was used the longest time ago, as where the disk is full; whether there was one."""
        with self._locked():
            whole, _ = self._contents()
            victims = [file for file in sorted(whole) if file.name not in keep]
            if victims:
                (self.folder / victims[0].name).unlink(missing_ok=True)
            return bool(victims)

    def _has_room(self, partial: Path, size: int, keep: Collection[str]) -> bool:
        """Remove what was used the longest time ago until so many bytes fit, and count them; whether they do."""
        with self._locked():
            whole, arriving = self._contents()
            free = self.size - size - sum(file.bytes for file in (*whole, *arriving))
            for file in sorted(whole, key=lambda file: (file.name in keep, file)):
                if free >= 0:
                    break
                (self.folder / file.name).unlink(missing_ok=True)
                free += file.bytes
            if free >= 0:
                partial.touch()
            return free >= 0

    def _contents(self) -> tuple[list[_Cached], list[_Cached]]:
        """What is here and what is on its way; what a process has left that ended at it is removed."""
        whole, arriving = [], []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if _WHOLE.fullmatch(entry.name):
                    stat = entry.stat()
                    whole.append(_Cached(stat.st_mtime, stat.st_size, entry.name))
                elif match := _ARRIVING.fullmatch(entry.name):
                    if (claim := self._try_claim(match[1])) is None:
                        arriving.append(_Cached(0.0, int(match[2]), entry.name))
                        continue
                    Path(entry).unlink(missing_ok=True)
                    self._release(match[1], claim)
        return whole, arriving

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _claimed(self, sha256: str, stop: threading.Event) -> Iterator[bool]:
        """Be the one who fetches this file; False when another has done it meanwhile."""
        while (claim := self._try_claim(sha256)) is None:
            _pause(stop)
        try:
            yield not (self.folder / sha256).exists()
        finally:
            self._release(sha256, claim)

    def _try_claim(self, sha256: str) -> BinaryIO | None:
        path = self.folder / f"{sha256}.claim"
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its owner has just removed it
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        return None

    def _release(self, sha256: str, claim: BinaryIO) -> None:
        (self.folder / f"{sha256}.claim").unlink(missing_ok=True)  # before it is unlocked: see `_try_claim`
        claim.close()


def check_arrived(shard: ShardFile, path: Path) -> None:
    """Raise DamagedError unless a file is the one that the manifest promises."""
    size = path.stat().st_size
    if size != shard.bytes:
        raise DamagedError(f"{size} bytes arrived, but the manifest says {shard.bytes}")
    if file_sha256(path) != shard.sha256:
        raise DamagedError("its sha256 differs from the manifest's")


def _pause(stop: threading.Event) -> None:
    if stop.wait(_POLL):
        raise StoppedError
