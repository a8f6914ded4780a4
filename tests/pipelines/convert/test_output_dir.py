from __future__ import annotations

import errno
import os

import pytest

from spark_fast.errors import StorageError
from spark_fast.pipelines.convert.conversion import convert
from spark_fast.pipelines.convert.output_dir import locked, storage
from tests.pipelines.convert.test_conversion import settings


def test_two_conversions_cannot_write_to_one_folder(image_folder, tmp_path):
    root = image_folder()

    def again(progress) -> None:
        if progress.done == 3:
            convert(root, tmp_path / "out", settings())

    with pytest.raises(StorageError, match="another conversion is writing to"):
        convert(root, tmp_path / "out", settings(), on_progress=again)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full. Finished shards are kept: free some space and run the same command again"),
        (errno.EIO, "Input/output error. Finished shards are kept: repair the storage and run the same command again"),
    ],
)
def test_a_failure_to_write_says_what_is_kept_and_what_to_do(tmp_path, number, message):
    with pytest.raises(StorageError, match=message), storage(tmp_path):
        raise OSError(number, os.strerror(number))


def test_parts_share_a_folder_and_keep_out_themselves_and_the_whole(tmp_path):
    with locked(tmp_path, "part-1"), locked(tmp_path, "part-2"):
        for name in ("part-1", "part-2", ""):
            with pytest.raises(StorageError, match="another conversion is writing to"), locked(tmp_path, name):
                pass
    with locked(tmp_path):
        pass
