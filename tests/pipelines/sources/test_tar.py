from __future__ import annotations

import io
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sources.folder import MAX_FILE_BYTES, folder_source
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS
from spark_fast.pipelines.sources.tar import tar_source
from spark_fast.pipelines.sources.tars.webdataset import TarSource
from tests.pipelines.tars import tar_of, tar_of_tars


@pytest.fixture
def archive(image_folder, tmp_path) -> Path:
    (tmp_path / "train.tar").write_bytes(tar_of_tars(image_folder() / "train"))
    return tmp_path / "train.tar"


def written(folder: Path, content: bytes) -> Path:
    (folder / "some.tar").write_bytes(content)
    return folder / "some.tar"


def names(source: TarSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_a_tar_of_class_tars_lists_as_the_unpacked_folder_would(archive, tmp_path):
    folder, tar = folder_source(tmp_path / "images" / "train"), tar_source(archive)
    assert tar.fingerprint() == folder.fingerprint()  # names, order and labels
    assert tar.classes == folder.classes == ["n0000", "n0001", "n0002"]
    assert [tar.read(i) for i in range(24)] == [folder.read(i) for i in range(24)]
    part = tar.subset(np.array([20, 3]))
    assert [part.read(0), part.read(1)] == [folder.read(20), folder.read(3)]
    assert part.labels.tolist() == [2, 0]


def test_a_tar_of_class_folders_of_arrays_lists_them_where_any_channels_are_read(tmp_path):
    path = written(tmp_path, tar_of({"b/z.npy": b"1", "a/y.tif": b"2", "a/x.txt": b""}))
    source = tar_source(path, BAND_EXTENSIONS)
    assert (names(source), source.labels.tolist(), source.classes) == (["a/y.tif", "b/z.npy"], [0, 1], ["a", "b"])
    with pytest.raises(DataError, match=r"no file in it ends in .*\.npy"):
        tar_source(written(tmp_path, tar_of({"a/x.txt": b""})), BAND_EXTENSIONS)


def test_a_flat_tar_is_unlabelled_and_sorted(tmp_path):
    source = tar_source(
        written(tmp_path, tar_of({"./b.JPEG": b"2", "a.JPEG": b"1", "readme.txt": b"", "._a.jpg": b""}))
    )
    assert names(source) == ["a.JPEG", "b.JPEG"]
    assert [source.read(0), source.read(1)] == [b"1", b"2"]
    assert source.labels is None
    assert source.classes == []


def test_a_packed_folder_of_class_folders_lists_as_that_folder(tmp_path):
    members = {"b/z.jpg": b"1", "b/deeper/a.jpg": b"2", "a/y.jpg": b"3"}
    for name, content in members.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(tmp_path / "images", ".")
    folder, source = folder_source(tmp_path / "images"), tar_source(tmp_path / "some.tar")
    assert source.fingerprint() == folder.fingerprint()
    assert [source.read(i) for i in range(3)] == [folder.read(i) for i in range(3)]


def test_images_outside_the_classes_are_left_out_with_a_warning(tmp_path, caplog):
    source = tar_source(written(tmp_path, tar_of({"n1.tar": tar_of({"a.jpg": b"1"}), "loose.jpg": b"2"})))
    assert names(source) == ["n1/a.jpg"]
    assert "1 images outside the classes are left out" in caplog.text


def test_tars_list_no_machine_made_members_and_count_what_they_leave_out(tmp_path, caplog):
    members = {"a/1.jpg": b"1", "__MACOSX/a/._1.jpg": b"", "__MACOSX/2.jpg": b"", "b/.ipynb_checkpoints/3.jpg": b""}
    source = tar_source(written(tmp_path, tar_of({**members, "b/4.jfif": b"4", "a/notes.txt": b""})))
    assert (names(source), source.classes) == (["a/1.jpg", "b/4.jfif"], ["a", "b"])
    assert "left out: 1 files by extension: .txt (1); hidden or system: 3 files" in caplog.text


def test_a_tar_of_several_splits_is_refused(tmp_path):
    content = tar_of({"d/train/n1/1.jpg": b"1", "d/val/n1/2.jpg": b"2"})
    with pytest.raises(DataError, match=r"several splits \(d/train/, d/val/\), .* Unpack it, tar -xf \S+/some.tar"):
        tar_source(written(tmp_path, content))


def test_images_in_folders_beside_class_tars_are_left_out_too(tmp_path, caplog):
    source = tar_source(written(tmp_path, tar_of({"n1.tar": tar_of({"a.jpg": b"1"}), "x/b.jpg": b"2"})))
    assert names(source) == ["n1/a.jpg"]
    assert "1 images outside the classes are left out" in caplog.text


def test_an_empty_class_of_a_tar_keeps_its_number_and_is_named(tmp_path, caplog):
    source = tar_source(written(tmp_path, tar_of({"a.tar": tar_of({"x.txt": b""}), "b.tar": tar_of({"1.jpg": b"1"})})))
    assert (source.labels.tolist(), source.classes) == ([1], ["a", "b"])
    assert "1 classes have no images: a" in caplog.text


def test_two_tars_of_one_class_are_refused_naming_both(tmp_path):
    one, other = tar_of({"a.jpg": b"1"}), tar_of({"b.jpg": b"2"})
    with pytest.raises(DataError, match=r"some.tar holds the class n1 twice, in old/n1.tar and new/n1.tar: "):
        tar_source(written(tmp_path, tar_of({"old/n1.tar": one, "new/n1.tar": other})))
    assert names(tar_source(written(tmp_path, tar_of({"old/n1.tar": one, "new/n2.tar": other})))) == [
        "n1/a.jpg",
        "n2/b.jpg",
    ]


def test_long_and_strange_names_are_read(tmp_path):
    strange = ["x" * 150 + ".jpg", "ü ñ\n.jpg", "\udcff.jpg"]
    source = tar_source(written(tmp_path, tar_of({name: name.encode("utf-8", "surrogateescape") for name in strange})))
    assert sorted(source.read(i) for i in range(3)) == sorted(n.encode("utf-8", "surrogateescape") for n in strange)
    assert all(source.name(i).encode("utf-8") for i in range(3))


@pytest.mark.slow
def test_threads_and_processes_may_read_at_once(archive):
    source = tar_source(archive)
    alone = [source.read(i) for i in range(24)] * 8
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.read, list(range(24)) * 8)) == alone
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        assert list(processes.map(pickle.loads(pickle.dumps(source)).read, range(24))) == alone[:24]


def test_every_truncation_is_found_and_names_the_file(archive):
    whole = archive.read_bytes()
    last = len(whole.rstrip(b"\0"))
    for size in np.random.default_rng(0).integers(0, last, 64).tolist():
        archive.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train\.tar"):
            tar_source(archive)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    inner = bytearray(tar_of({"a.jpg": b"1", "b.jpg": b"2"}))
    inner[1024 + 3] ^= 1  # the second header's name: its checksum no longer fits
    with pytest.raises(DataError, match=r"some.tar is truncated or damaged at byte \d+: n1.tar: no header"):
        tar_source(written(tmp_path, tar_of({"n1.tar": bytes(inner)})))


def test_a_tar_cut_after_it_was_listed_is_no_bad_image(archive):
    source = tar_source(archive)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"train.tar ends within n0000/0007.JPEG: it was truncated"):
        source.read(7)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg"])
@pytest.mark.parametrize("nested", [False, True])
def test_names_outside_the_archive_are_refused(tmp_path, name, nested):
    content = tar_of({name: b"1"})
    with pytest.raises(DataError, match=r"some.tar: .*a.jpg' lies outside the archive"):
        tar_source(written(tmp_path, tar_of({"n1.tar": content}) if nested else content))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_devices_are_refused(tmp_path, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"'a.jpg' is a link, device or sparse file"):
        tar_source(written(tmp_path, buffer.getvalue()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot list the images of .*some.tar: empty"),
        (b"\x1f\x8b" + b"gzip" * 500, "cannot list the images of .*some.tar"),
        (tar_of({"readme.txt": b"x"}), "no images in .*some.tar"),
        (tar_of({"n1.tar": tar_of({})}), "some.tar"),
    ],
)
def test_what_is_no_tar_of_images_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        tar_source(written(tmp_path, content))


def test_an_absurdly_large_member_is_not_read(tmp_path):
    source = TarSource(tmp_path, [b"a"], None, [], [tmp_path / "some.tar"], np.array([[0, 0, MAX_FILE_BYTES + 1]]))
    with pytest.raises(ImageError, match="more than the limit"):
        source.read(0)
