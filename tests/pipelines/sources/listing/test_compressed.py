from __future__ import annotations

import io
import subprocess
import tarfile

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.detect import detect_source, images_to_convert
from spark_fast.pipelines.sources.listing.compressed import is_compressed


def write_targz(path, names):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))


def test_compressed_archives_are_told_by_their_names():
    assert all(map(is_compressed, ["a.tar.gz", "a.TGZ", "a.tar.zst", "a.zip", "a.tar.xz"]))
    assert not any(map(is_compressed, ["a.tar", "a.gz.txt", "a.jpg"]))


@pytest.mark.parametrize("read", [detect_source, images_to_convert])
def test_imagenet_from_the_hub_is_refused_with_the_two_commands_that_make_it_readable(tmp_path, read):
    hub = tmp_path / "from the hub"
    for k in range(2):
        names = [f"n0{c}_{k}_n0{c}.JPEG" for c in (2, 1)]
        write_targz(hub / f"train_images_{k}.tar.gz", names)
    with pytest.raises(DataError, match="is compressed and has no random access") as error:
        read(hub)
    commands = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    source = read(tmp_path / "IMAGES" / "list.txt")
    assert [source.read(i).decode() for i in range(4)] == [
        "n01_0_n01.JPEG", "n01_1_n01.JPEG", "n02_0_n02.JPEG", "n02_1_n02.JPEG",
    ]  # fmt: skip
    assert (source.labels.tolist(), source.classes) == ([0, 0, 1, 1], ["n01", "n02"])
    assert len(read(tmp_path / "IMAGES")) == 4


@pytest.mark.parametrize("read", [detect_source, images_to_convert])
def test_other_compressed_archives_are_refused_with_one_command(tmp_path, read):
    write_targz(tmp_path / "a.tar.gz", ["x/1.jpg"])
    with pytest.raises(DataError, match=r"a.tar.gz is compressed") as error:
        read(tmp_path / "a.tar.gz")
    (command,) = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert read(tmp_path / "IMAGES").name(0) == "x/1.jpg"
    (tmp_path / "b.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"unzip -q"):
        read(tmp_path / "b.zip")


def test_an_archive_that_lies_beside_what_was_unpacked_from_it_is_left_alone(tmp_path, caplog):
    write_targz(tmp_path / "a.tar.gz", ["1.jpg"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"1")
    assert len(detect_source(tmp_path)) == 1
    assert "left out: 1 files by extension: .tar.gz (1)" in caplog.text
