"""Files of one folder on a server, through fsspec, asked for again when it fails.

A failed try is followed by a pause that doubles, and after the last try by a DataError. So a server may be gone for a
minute and a half, or answer nonsense for as long. Once it was given up, every further file has one try until one
succeeds: else each decoder thread would wait as long again before the run can end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from spark_fast.commands import INSTALL_REMOTE
from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.sources.remote.url import without_credentials

if TYPE_CHECKING:  # it is optional
    from fsspec import AbstractFileSystem

logger = logging.getLogger("spark_fast.pipelines")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)  # seconds between the tries of one file
TRIES_IF_ABSENT = 3  # where the server says that there is no such file, or that it may not be read
CONNECT_SECONDS, SILENT_SECONDS = 20.0, 20.0  # without a connection, without a byte
LONGEST_SECONDS, SLOWEST = 60.0, 50_000  # of one try: so many, and one more for each 50 kB

T = TypeVar("T")


class StoppedError(Exception):
    """Nobody waits for the file any more."""


class DamagedError(Exception):
    """What arrived is not what the manifest promises."""


class Server:
    """The files in the folder at `url`.

    Unpickled, it is opened when it is first used: fsspec starts a thread, and refuses to work in a process that was
    forked since.

    Raises SettingsError when the packages that read such a URL are not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._given_up = False
        _ = self._folder  # what is not installed is said now

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        import fsspec

        self.url, self._given_up = url, False
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))  # imported here, before forks, which share it

    @cached_property
    def _folder(self) -> tuple[AbstractFileSystem, str]:
        return _open(self.url)

    def read(self, name: str) -> bytes:
        """A small file, by one try. Raises whatever fsspec does."""
        files, folder = self._folder
        return files.cat_file(f"{folder}/{name}")

    def download(self, name: str, size: int, path: Path, stop: threading.Event, tell: Callable[[int], None]) -> None:
        """A file of `size` bytes to `path`, by one try; `tell` is called with the bytes so far.

        Raises StoppedError when `stop` is set meanwhile, TimeoutError when it takes too long, and whatever fsspec does.
        """
        from fsspec.callbacks import Callback

        end = time.monotonic() + LONGEST_SECONDS + size / SLOWEST

        class Watched(Callback):
            def call(self, *_: object, **__: object) -> None:
                if stop.is_set():
                    raise StoppedError
                if self.value > size:
                    raise DamagedError(f"more than the {size} bytes of the manifest")
                if time.monotonic() > end:
                    raise TimeoutError(f"slower than {SLOWEST // 1000} kB/s")
                tell(self.value)

        files, folder = self._folder
        files.get_file(f"{folder}/{name}", str(path), callback=Watched())

    def patiently(self, name: str, attempt: Callable[[], T], stop: threading.Event | None = None) -> T:
        """What `attempt` returns, tried again when it fails.

        Raises:
            DataError: the last try failed, too; with its reason.
            StoppedError: `stop` was set.
        """
        stop = stop or threading.Event()
        pauses = () if self._given_up else PAUSES
        absent = 0  # how often the server said so
        for number, pause in enumerate((*pauses, None), 1):
            try:
                result = attempt()
            except StoppedError:
                raise
            except Exception as error:
                reason = _reason(error)
                absent += isinstance(error, (FileNotFoundError, PermissionError))
            else:
                self._given_up = False
                return result
            if pause is None or absent == TRIES_IF_ABSENT:
                break
            logger.warning(
                "%s/%s: attempt %d of %d failed, the next in %g s: %s",
                self.url, name, number, len(PAUSES) + 1, pause, reason,
            )  # fmt: skip
            if stop.wait(pause):
                raise StoppedError
        self._given_up = True
        raise DataError(f"{self.url}/{name} cannot be read after {number} attempts: {reason}")


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the folder's path in it; nothing is asked of the server."""
    try:
        import fsspec
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        scheme = fsspec.utils.get_protocol(url)
        return url_to_fs(url, **({} if scheme in conf else _timeouts(scheme)))
    except ImportError as error:
        raise SettingsError(
            f"reading {url} needs a package that is not installed ({error}): {INSTALL_REMOTE}"
        ) from None
    except ValueError as error:
        raise SettingsError(f"fsspec cannot open {url}: {without_credentials(str(error))}") from None


def _timeouts(scheme: str) -> dict[str, dict[str, object]]:
    """After which silence a try has failed; s3fs has its own 15 s, gcsfs its own."""
    if scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the server has no such file"
    return without_credentials(f"{type(error).__name__}: {error}".removesuffix(": "))
