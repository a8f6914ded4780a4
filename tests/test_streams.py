"""The output of a run: a reader that goes, an encoding that lacks a character, a bar, and the copy of it all."""

import errno
import io
import logging
import os
import sys

import pytest

from spark_fast.streams import REMEMBERED, KeptStream, keep_output
from tests.commands import as_it_was


@pytest.fixture
def pipe():
    """(reading end, a text stream that writes to the other)."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        yield reading, stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what a failed test has left in the buffer


def test_a_reader_that_goes_costs_the_output_and_is_told_once(pipe, tmp_path, caplog):
    reading, stream = pipe
    kept = KeptStream(stream)
    kept.copy_to(tmp_path / "copy")
    print("read", file=kept, flush=True)
    os.close(reading)
    for i in range(3):
        print(i, file=kept, flush=True)
    os.write(stream.fileno(), b"another writer to the descriptor")
    assert (tmp_path / "copy").read_text() == "read\n0\n1\n2\n"
    assert len(caplog.messages) == 1
    assert "any more: the run continues without it" in caplog.messages[0]


def test_a_terminal_that_goes_is_the_same_and_a_full_disk_is_not(caplog):
    class Failing(io.StringIO):
        name = "<stdout>"

        def __init__(self, number):
            super().__init__()
            self.number, self.nowhere = number, os.open(os.devnull, os.O_WRONLY)

        def write(self, text):
            raise OSError(self.number, os.strerror(self.number))

        def fileno(self):
            return self.nowhere

    print("x", file=KeptStream(Failing(errno.EIO)))
    assert "nobody reads stdout any more: the run continues without it" in caplog.messages
    with pytest.raises(OSError, match="No space left"):
        print("x", file=KeptStream(Failing(errno.ENOSPC)))


def test_what_the_encoding_lacks_is_escaped_and_whole_in_the_copy(tmp_path):
    raw = io.BytesIO()
    kept = KeptStream(io.TextIOWrapper(raw, encoding="ascii"))
    kept.copy_to(tmp_path / "copy")
    print("Bilder ü", os.fsdecode(b"\xfc"), file=kept, flush=True)
    assert raw.getvalue() == b"Bilder \\xfc \\udcfc\n"
    assert (tmp_path / "copy").read_bytes() == "Bilder ü \\udcfc\n".encode()


def test_the_copy_begins_with_what_was_printed_before_there_was_a_file(tmp_path):
    kept = KeptStream(io.StringIO())
    kept.write("early\n")
    kept.copy_to(tmp_path / "copy")
    kept.note("for the copy alone\n")
    kept.write("late\n")
    assert (tmp_path / "copy").read_text() == "early\nfor the copy alone\nlate\n"
    assert kept._stream.getvalue() == "early\nlate\n"
    long = KeptStream(io.StringIO())
    long.write("x" * (REMEMBERED + 9))
    long.copy_to(tmp_path / "long")
    assert (tmp_path / "long").stat().st_size == REMEMBERED


def test_whole_lines_are_handed_to_a_bar_on_a_terminal_and_nowhere_else():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    kept, elsewhere, shown = KeptStream(terminal), KeptStream(io.StringIO()), []
    for stream in (kept, elsewhere):
        stream.show_lines_by(shown.append)
        stream.write("a\nb")
        stream.write("c\nrest")
        stream.show_lines_by(None)
        stream.write("\n")
    assert shown == ["a", "bc"]
    assert terminal.getvalue() == "rest\n"
    assert elsewhere._stream.getvalue() == "a\nbc\nrest\n"


def test_the_log_goes_where_stderr_goes_and_nothing_is_wrapped_twice():
    with as_it_was():
        sys.stderr = io.StringIO()
        ours, other = logging.StreamHandler(sys.stderr), logging.StreamHandler(io.StringIO())
        logging.getLogger().handlers = [ours, other]
        first = keep_output()
        assert (sys.stdout, sys.stderr) == first == keep_output()
        assert ours.stream is sys.stderr
        assert other.stream is not sys.stderr
