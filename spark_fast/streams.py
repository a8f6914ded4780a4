"""The output of a run: it outlives its reader, takes any text, and is copied into the run folder."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

log = logging.getLogger("spark_fast")

READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe (`| head`), of a terminal
REMEMBERED = 2**20  # bytes printed before there is a file to copy them to


class KeptStream:
    """A text stream that cannot end the run, with a copy in a file from the first word on.

    - Where the reader has gone, what is still written goes nowhere, and one warning says so.
    - Characters that the stream's encoding lacks are written as backslash escapes.
    - The copy is UTF-8. It ends where it cannot be written (a full disk).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._file: BinaryIO | None = None
        self._path = Path()
        self._early: bytes | None = b""  # None: there is, or was, a file
        self._show: Callable[[str], None] | None = None
        self._line = ""  # begun, for `_show`

    @property
    def copy(self) -> BinaryIO | None:
        """The file of the copy."""
        return self._file

    def copy_to(self, path: Path) -> None:
        """Append what was and will be written to this file; raises OSError where it cannot be opened."""
        file = path.open("ab", buffering=0)
        early, self._early = self._early, None
        if self._file is not None:
            self._file.close()
        self._file, self._path = file, path
        self._note(early or b"")

    def show_lines_by(self, show: Callable[[str], None] | None) -> None:
        """Let a progress bar print whole lines above itself, where this is a terminal; None: no longer."""
        self._show = show if self._stream.isatty() else None
        if self._line and self._show is None:
            line, self._line = self._line, ""
            self._write(line)

    def note(self, text: str) -> None:
        """Write to the copy alone."""
        self._note(text.encode(errors="backslashreplace"))

    def write(self, text: str) -> int:
        """Write as to any text stream; returns the number of characters."""
        self.note(text)
        if self._show is None:
            self._write(text)
        else:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._show(line)
        return len(text)

    def flush(self) -> None:
        """Flush, as any text stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._do_without(error)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._do_without(error)

    def _note(self, data: bytes) -> None:
        if self._early is not None:
            self._early += data[: REMEMBERED - len(self._early)]
        elif self._file is not None:
            try:
                self._file.write(data)
            except OSError as error:
                self._file = None
                self._write(f"what is printed is no longer copied to {self._path}: {error}\n")

    def _do_without(self, error: OSError) -> None:
        """Point the stream's descriptor at /dev/null, so that buffered text and other writers no longer fail."""
        if error.errno not in READER_GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        log.warning("nobody reads %s any more: the run continues without it", str(self._stream.name).strip("<>"))


def keep_output() -> tuple[KeptStream, KeptStream]:
    """Make stdout and stderr such streams, unless they are; the log's handlers with them."""
    kept = []
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        after = before if isinstance(before, KeptStream) else KeptStream(before)
        setattr(sys, name, after)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:  # not one of the caller's own
                handler.setStream(after)
        kept.append(after)
    return kept[0], kept[1]
