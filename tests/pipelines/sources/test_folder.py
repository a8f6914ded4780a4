from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.folder import MAX_FILE_BYTES
from tests.pipelines.pictures import jpeg
from tests.pipelines.sources.listing import names_of, write


def test_class_folders_are_listed_and_labelled_as_by_torchvision(image_folder):
    root = image_folder(20, 4)
    (root / "train" / "n0001" / "deeper").mkdir()
    (root / "train" / "n0001" / "deeper" / "a.png").write_bytes(jpeg(0))
    theirs = ImageFolder(root / "train")
    source = detect_source(root)
    assert [str(source.root / source.name(i)) for i in range(len(source))] == [p for p, _ in theirs.samples]
    assert source.labels.tolist() == theirs.targets
    assert source.classes == theirs.classes
    assert source.read(3) == Path(theirs.samples[3][0]).read_bytes()


def test_a_flat_folder_is_unlabelled(tmp_path):
    write(tmp_path, "b.JPG", "a.jpeg", "notes.txt", ".hidden.jpg", "._c.jpg")
    source = detect_source(tmp_path)
    assert names_of(tmp_path) == ["a.jpeg", "b.JPG"]
    assert source.labels is None
    assert [source.read(0), source.read(1)] == [b"image 1", b"image 0"]


def test_images_beside_class_folders_are_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path, "x/a.jpg", "loose.jpg")
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        assert names_of(tmp_path) == ["x/a.jpg"]
    assert "1 images outside the class folders are left out" in caplog.text


def test_an_empty_class_folder_keeps_its_number_and_is_named_once(tmp_path, caplog):
    write(tmp_path, "a/1.jpg", "c/2.jpg")
    (tmp_path / "b").mkdir()
    (tmp_path / "d" / "deeper").mkdir(parents=True)
    theirs = ImageFolder(tmp_path, allow_empty=True)
    source = detect_source(tmp_path)
    assert (source.labels.tolist(), source.classes) == (theirs.targets, theirs.classes)
    assert source.classes == ["a", "b", "c", "d"]
    assert caplog.messages == [f"{tmp_path}: 2 class folders have no images: b, d"]


def test_strange_names_are_read_and_printable(tmp_path):
    strange = [b"\xff\xfe.jpg", "ü ñ\n.jpg".encode(), b"a" * 200 + b".jpg", b"#1 (2).JPEG"]
    for name in strange:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    source = detect_source(tmp_path)
    assert {source.read(i) for i in range(4)} == set(strange)
    assert all(source.name(i).encode("utf-8") for i in range(4))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("x/a.jpg\nmy pictures/b 2.jpg\n", None),
        ("x/a.jpg\t3\nmy pictures/b 2.jpg\t0\n", [3, 0]),
        ("x/a.jpg 3\r\n\r\nmy pictures/b 2.jpg 0", [3, 0]),
    ],
)
def test_a_list_names_images_with_or_without_labels(tmp_path, text, labels):
    write(tmp_path, "x/a.jpg", "my pictures/b 2.jpg")
    (tmp_path / "list.txt").write_bytes(text.encode())
    source = detect_source(tmp_path / "list.txt")
    assert names_of(tmp_path / "list.txt") == ["x/a.jpg", "my pictures/b 2.jpg"]
    assert (source.labels is None) if labels is None else (source.labels.tolist() == labels)
    assert [source.read(0), source.read(1)] == [b"image 0", b"image 1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty: expected one image path per line"),
        (b"a.jpg 1\nb.jpg\n", "line 2: either all lines have a label or none"),
        (b"a.jpg\n../b.jpg\n", "line 2: '../b.jpg' lies outside the list's folder"),
        (b"a.jpg\nx/../../b.jpg\n", "line 2: .* lies outside"),
        (b"/etc/passwd\n", "line 1: '/etc/passwd' lies outside"),
        (b"\0\1\2", "is not a file list: it holds binary data"),
        (b"missing.jpg\n", "do not exist: .*missing.jpg is missing"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
    write(tmp_path, "a.jpg")
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(DataError, match=message):
        detect_source(tmp_path / "list.txt")


def test_folders_without_images_are_refused_saying_what_was_sought(tmp_path):
    with pytest.raises(DataError, match=r"no images in .*: it holds 0 folders and 0 other"):
        detect_source(tmp_path)
    write(tmp_path, "train/x/readme.txt", "train/notes.md")
    with pytest.raises(DataError, match=r"train: it holds 1 folders and 1 other entries, but no .*\.jpeg, \.png"):
        detect_source(tmp_path)
    write(tmp_path / "arrays", "a/x.npy", "a/y.dcm", "a/z.txt")
    with pytest.raises(DataError, match=r"Files ending in \.dcm, \.npy are read with --in_chans\."):
        detect_source(tmp_path / "arrays")


def test_an_absurdly_large_file_is_not_read(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(ImageError, match="more than the limit"):
        detect_source(tmp_path).read(0)


def test_files_may_be_larger_where_images_may(tmp_path):
    (tmp_path / "large.jpg").write_bytes(jpeg(0))
    with (tmp_path / "large.jpg").open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    source = detect_source(tmp_path)
    with pytest.raises(ImageError, match=r"--max_pixels 65 \(train, eval, convert\) reads it"):
        source.read(0)
    source.allow_pixels(65 * 2**20)
    for allowed in (source, source.subset(np.array([0]))):
        assert len(allowed.read(0)) == MAX_FILE_BYTES + 1


def test_the_index_of_a_folder_is_small_and_fingerprints_its_listing(image_folder):
    source = detect_source(image_folder(24, 3))
    again = detect_source(image_folder(24, 3, name="elsewhere"))
    assert source.fingerprint() == again.fingerprint()
    part = source.subset(np.array([5, 3]))
    assert [part.name(0), part.name(1)] == [source.name(5), source.name(3)]
    assert part.labels.tolist() == [source.labels[5], source.labels[3]]
    assert part.fingerprint() != source.fingerprint()
