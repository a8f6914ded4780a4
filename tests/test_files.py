"""Files that are whole or not there."""

import errno
import hashlib

import pytest

from spark_fast.files import atomic_write, file_sha256


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half():
        with atomic_write(path) as file:
            file.write(b"half of the new")
            raise OSError(errno.ENOSPC, "disk is full")

    with pytest.raises(OSError, match=rf"cannot write {path}: disk is full; the file before it is kept") as caught:
        write_half()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_in_any_other_way_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"

    def write_half():
        with atomic_write(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/below", "nowhere/file"])
def test_a_place_that_cannot_be_is_named(tmp_path, place):
    (tmp_path / "file").write_bytes(b"no folder")
    with pytest.raises(OSError, match=f"cannot write .*{place}"), atomic_write(tmp_path / place) as file:
        file.write(b"new")


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a longer old content")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"a longer old content"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "file.partial"]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_is_that_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 10_000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
