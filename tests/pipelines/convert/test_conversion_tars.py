"""Conversion of images in tars, and of the splits and classes that their names tell."""

from __future__ import annotations

import re

from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.pipelines.pictures import jpeg
from tests.pipelines.tars import tar_of

SETTINGS = ConvertSettings(Reencode(short_side=0), images_per_shard=5)


def test_a_tar_without_classes_becomes_unlabelled_and_says_how_to_give_labels(tmp_path, caplog):
    src = tmp_path / "src"
    src.mkdir()
    images = {f"ILSVRC2012_val_{i}.JPEG": jpeg(i) for i in range(3)}
    (src / "ILSVRC2012_img_val.tar").write_bytes(tar_of(images))
    convert(src, tmp_path / "out", SETTINGS)
    assert read_manifest(tmp_path / "out" / "val").labelled is False
    assert re.search(r"_val.tar has no class names, .* without labels.* a file list of lines `path label`", caplog.text)
    caplog.clear()
    for name, content in images.items():  # what it says: unpack, list, convert in its place
        (src / name).write_bytes(content)
    (src / "labels.txt").write_text("".join(f"{name} {7 - i}\n" for i, name in enumerate(images)))
    convert(src / "labels.txt", tmp_path / "out" / "val", SETTINGS, overwrite=True)
    labelled = detect_source(tmp_path / "out" / "val")
    assert labelled.labels.tolist() == [7, 6, 5]
    assert [labelled.read(i) for i in range(3)] == list(images.values())
    assert not caplog.text


def shard_of(numbers) -> bytes:
    """A tar as webdataset's writer makes it, with labels 0 1 0 1 ..."""
    members = ({f"{i:05d}.jpg": jpeg(i), f"{i:05d}.cls": b"%d" % (i % 2)} for i in numbers)
    return tar_of({name: content for sample in members for name, content in sample.items()})


def test_tars_of_webdataset_convert_with_their_labels_and_splits(tmp_path):
    src = tmp_path / "wds"
    src.mkdir()
    for name, numbers in (("train-0000", range(4)), ("train-0001", range(4, 8)), ("validation-00", range(8, 11))):
        (src / f"imagenet1k-{name}.tar").write_bytes(shard_of(numbers))
    files = {path.name: path.read_bytes() for path in src.glob("*train*")}
    (tmp_path / "all.tar").write_bytes(tar_of(files))
    folders = [folder.name for folder, _ in convert(src, tmp_path / "out", SETTINGS)]
    assert folders == ["train", "val"]
    assert detect_source(tmp_path / "out").labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert detect_source(tmp_path / "out", "val").labels.tolist() == [0, 1, 0]
    convert(tmp_path / "all.tar", tmp_path / "packed", SETTINGS)
    of_folder, of_tar = detect_source(tmp_path / "out"), detect_source(tmp_path / "packed")
    assert of_tar.labels.tolist() == of_folder.labels.tolist()
    assert [of_tar.read(i) for i in range(8)] == [of_folder.read(i) for i in range(8)] == [jpeg(i) for i in range(8)]


def test_a_class_called_train_is_converted_as_a_class(tmp_path):
    src = tmp_path / "vehicles"
    for i, name in enumerate(["bus", "train", "tram", "truck"]):
        (src / name).mkdir(parents=True)
        (src / name / "1.jpg").write_bytes(jpeg(i))
    convert(src, tmp_path / "out", SETTINGS)
    source = detect_source(tmp_path / "out")
    assert (source.labels.tolist(), source.classes) == ([0, 1, 2, 3], ["bus", "train", "tram", "truck"])


def test_what_lies_beside_the_splits_is_told(tmp_path, caplog):
    for name in ("train/a", "validation/a", "val/a"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "1.jpg").write_bytes(jpeg(1))
    convert(tmp_path / "src", tmp_path / "out", SETTINGS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert "read: train/, val/; left out: validation/ (1 images)" in caplog.text
