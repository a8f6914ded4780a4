from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.detect import detect_source, images_to_convert
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS
from spark_fast.pipelines.sources.tars.webdataset import splits_of_tars
from tests.pipelines.tars import tar_of


def shard(first: int, count: int = 4, image: str = "jpg", label: str = "cls", folder: str = "") -> bytes:
    """Samples with labels 0 1 0 1 ... as webdataset's writer makes them."""
    members = {}
    for i in range(first, first + count):
        members[f"{folder}{i:05d}.{image}"] = b"image %d" % i
        members[f"{folder}{i:05d}.{label}"] = b"%d" % (i % 2)
    return tar_of(members)


def rows(source):
    return [(source.read(i).decode(), int(source.labels[i])) for i in range(len(source))]


RIGHT = [(f"image {i}", i % 2) for i in range(8)]


@pytest.fixture
def wds(tmp_path):
    (tmp_path / "wds").mkdir()
    for s in range(2):
        (tmp_path / "wds" / f"imagenet1k-train-{s:04d}.tar").write_bytes(shard(4 * s))
    files = {path.name: path.read_bytes() for path in (tmp_path / "wds").iterdir()}
    (tmp_path / "all.tar").write_bytes(tar_of(files))
    (tmp_path / "one.tar").write_bytes(shard(0, 8))
    return tmp_path


def test_an_empty_download_before_the_others_is_named(wds):
    (wds / "wds" / "imagenet1k-train-.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot list the images of .*imagenet1k-train-.tar"):
        detect_source(wds / "wds")


@pytest.mark.parametrize("path", ["wds", "all.tar", "one.tar"])
@pytest.mark.parametrize("read", [detect_source, images_to_convert])
def test_labels_are_those_of_the_cls_in_a_folder_of_tars_a_tar_of_tars_and_a_tar(wds, path, read):
    source = read(wds / path)
    assert rows(source) == RIGHT
    assert source.classes == []
    part = pickle.loads(pickle.dumps(source)).subset(np.array([7, 2]))
    assert rows(part) == [RIGHT[7], RIGHT[2]]


def test_a_tar_of_tars_lists_as_their_folder(wds):
    assert detect_source(wds / "wds").fingerprint() == detect_source(wds / "all.tar").fingerprint()
    assert detect_source(wds / "wds").name(5) == "imagenet1k-train-0001/00005.jpg"


@pytest.mark.parametrize("image", ["jpeg", "png", "webp", "JPG"])
@pytest.mark.parametrize("folder", ["", "n01/", "a/b.c/"])
def test_other_endings_and_keys_with_folders_are_read(tmp_path, image, folder):
    (tmp_path / "0.tar").write_bytes(shard(0, 8, image, folder=folder))
    for path in (tmp_path, tmp_path / "0.tar"):
        assert rows(detect_source(path)) == RIGHT


@pytest.mark.parametrize("image", ["npy", "npz", "dcm", "tif", "image.npy"])
def test_arrays_and_scans_are_images_where_any_channels_are_read(tmp_path, image):
    (tmp_path / "0.tar").write_bytes(shard(0, 8, image))
    (tmp_path / "tars.tar").write_bytes(tar_of({"0.tar": shard(0, 8, image)}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.tar").write_bytes(shard(0, 8, image))
    for path in ("0.tar", "tars.tar", "folder"):
        assert rows(detect_source(tmp_path / path, endings=BAND_EXTENSIONS)) == RIGHT
    if image != "tif":
        with pytest.raises(DataError, match="is a tar, which training does not read"):
            detect_source(tmp_path / "0.tar")


@pytest.mark.parametrize("packed", [False, True])
def test_captions_are_no_classes_and_neither_are_the_names_of_tars(tmp_path, packed, caplog):
    files = {
        f"{s:05d}.tar": tar_of({f"{s}{i}.{e}": b"%d %d" % (s, i) for i in range(2) for e in ("jpg", "json", "txt")})
        for s in range(2)
    }
    folder = tmp_path / "cc"
    folder.mkdir()
    for name, content in ({"all.tar": tar_of(files)} if packed else files).items():
        (folder / name).write_bytes(content)
    source = detect_source(folder / "all.tar" if packed else folder)
    assert (source.labels, source.classes, len(source)) == (None, [], 4)
    assert [source.read(i) for i in range(4)] == [b"0 0", b"0 1", b"1 0", b"1 1"]
    assert "left out: 8 files by extension: .json (4), .txt (4)" in caplog.text


def test_names_in_the_cls_are_numbered_in_sorted_order(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": b"1", "a.cls": b"dog\n", "b.jpg": b"2", "b.cls": b"cat"}))
    source = detect_source(tmp_path)
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["cat", "dog"])


def test_a_dot_in_a_name_and_masks_beside_images(tmp_path, caplog):
    members = {
        "x.1.jpg": b"dotted", "x.1.cls": b"3",
        "y.jpg": b"plain", "y.seg.png": b"mask", "y.cls": b"4",
        "z.left.jpg": b"left", "z.right.jpg": b"right", "z.cls": b"5",
    }  # fmt: skip
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    assert rows(detect_source(tmp_path)) == [("dotted", 3), ("plain", 4), ("left", 5), ("right", 5)]
    assert "1 images without a label are left out: 0/y.seg.png" in caplog.text


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"-1", "label '-1' is negative"),
        (b"2000000000", "label '2000000000' is too large"),
        (b"", "label '' is missing"),
        (b"cat", "label 'cat' is not a number, unlike"),
        (b"\x80\x04\x01\x00", "0.tar, b.jpg: label .* is not a number or a name of at most 256 bytes"),
        (b"x" * 300, "0.tar, b.jpg: label 'x{40}' is not a number or a name of at most 256 bytes"),
    ],
)
def test_a_label_that_is_no_class_is_refused_with_its_place(tmp_path, label, message):
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": b"1", "a.cls": b"0", "b.jpg": b"2", "b.cls": label}))
    with pytest.raises(DataError, match=rf"{tmp_path}.*{message}"):
        images_to_convert(tmp_path / "0.tar")


def test_images_with_a_part_of_their_own_after_the_name_share_its_label(tmp_path):
    members = {"1.left.jpg": b"left", "1.right.jpg": b"right", "1.cls": b"5"}
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    for path in (tmp_path, tmp_path / "0.tar"):
        assert rows(detect_source(path)) == [("left", 5), ("right", 5)]


def test_a_cls_that_belongs_to_no_image_is_no_label(tmp_path, caplog):
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": b"1", "article.cls": b"\\LoadClass" * 90}))
    assert images_to_convert(tmp_path / "0.tar").labels is None
    assert "left out: 1 files by extension: .cls (1)" in caplog.text


def test_tars_that_name_their_split_are_kept_apart(tmp_path, caplog):
    for name, first in (("imagenet1k-train-0000", 0), ("imagenet1k-train-0001", 4), ("imagenet1k-validation-00", 8)):
        (tmp_path / f"{name}.tar").write_bytes(shard(first))
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        assert rows(detect_source(tmp_path)) == RIGHT
    assert "2 tars of train are read, 1 others are left out" in caplog.text
    assert [label for _, label in rows(detect_source(tmp_path, "val"))] == [0, 1, 0, 1]
    assert len(detect_source(tmp_path, "all")) == 12
    assert splits_of_tars(tmp_path) == ["train", "val"]
    with pytest.raises(DataError, match="holds no folder test/"):
        detect_source(tmp_path, "test")
    (tmp_path / "more.tar").write_bytes(shard(20))
    with pytest.raises(DataError, match=r"tars of several splits, and more.tar, whose name has no split"):
        detect_source(tmp_path)


def test_a_tar_with_tars_of_several_splits_is_refused(tmp_path):
    (tmp_path / "all.tar").write_bytes(tar_of({"train-0.tar": shard(0), "val-0.tar": shard(4)}))
    with pytest.raises(DataError, match=r"holds tars of several splits .*unpack it, tar -xf"):
        detect_source(tmp_path / "all.tar")


def test_splits_in_folders_of_their_own(tmp_path, caplog):
    for split, first in (("train", 0), ("val", 4)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").write_bytes(shard(first))
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        assert rows(detect_source(tmp_path)) == RIGHT[:4]
    assert f"{tmp_path}: read: train/; left out: val/ (tars)" in caplog.text
    assert rows(detect_source(tmp_path, "val")) == RIGHT[4:]


def test_tars_beside_images_are_refused(wds):
    (wds / "wds" / "a").mkdir()
    (wds / "wds" / "a" / "1.jpg").write_bytes(b"1")
    with pytest.raises(DataError, match=r"holds images and tars of images, such as imagenet1k-train-0000.tar"):
        detect_source(wds / "wds")


def test_files_beside_the_tars_are_counted(wds, caplog):
    (wds / "wds" / "info.json").write_text("{}")
    detect_source(wds / "wds")
    assert "left out: 1 files by extension: .json (1)" in caplog.text


def test_imagenets_own_tars_are_still_classes(tmp_path):
    (tmp_path / "train.tar").write_bytes(
        tar_of({"n2.tar": tar_of({"b.JPEG": b"2"}), "n1.tar": tar_of({"a.JPEG": b"1"})})
    )
    source = images_to_convert(tmp_path / "train.tar")
    assert (source.labels.tolist(), source.classes) == ([0, 1], ["n1", "n2"])
    with pytest.raises(DataError, match=r"is a tar, which training does not read. Convert once"):
        detect_source(tmp_path / "train.tar")


def test_a_damaged_tar_among_them_is_named(wds):
    path = wds / "wds" / "imagenet1k-train-0001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"imagenet1k-train-0001\.tar"):
        detect_source(wds / "wds")


def test_a_tar_cut_after_it_was_listed_is_no_bad_image(wds):
    source = detect_source(wds / "wds")
    (wds / "wds" / "imagenet1k-train-0001.tar").write_bytes(b"")
    assert source.read(0) == b"image 0"
    with pytest.raises(DataError, match=r"imagenet1k-train-0001.tar ends within imagenet1k-train-0001/00005.jpg"):
        source.read(5)


def test_our_own_shards_are_read_by_their_folder_only(tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(shard(0))
    with pytest.raises(DataError, match=r"is one shard of a conversion: give its folder"):
        detect_source(tmp_path / "shard-000000.tar")
    for read in (detect_source, images_to_convert):
        with pytest.raises(DataError, match=r"no manifest.json: .* uses the names shard-NNNNNN.tar"):
            read(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"is already converted: give the original images"):
        images_to_convert(tmp_path)
