from __future__ import annotations

import logging
import subprocess

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.listing.splits import refuse_mixed_splits, split_of, split_of_file, train_folder
from tests.pipelines.sources.listing import names_of, write


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train", "train"), ("Train", "train"), ("TRAINING", "train"), ("train2017", "train"), ("train_2017", "train"),
        ("train_set", "train"), ("images_train", "train"), ("ILSVRC2012_img_train", "train"), ("trainval", "train"),
        ("val", "val"), ("Valid", "val"), ("validation", "val"), ("val2014", "val"), ("test", "test"),
        ("test-images", "test"), ("ILSVRC2012_img_test_v10102019", "test"), ("unlabeled2017", "unlabeled"),
        ("bullet_train", None), ("test_tube", None), ("trains", None), ("valley", None), ("n01440764", None),
    ],
)  # fmt: skip
def test_splits_are_told_by_their_names(name, kind):
    assert split_of(name) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("imagenet1k-train-0000", "train"), ("imagenet1k-validation-00", "val"), ("train-00001-of-01024", "train"),
        ("cc3m_val_3", "val"), ("00000", None), ("train-vs-test", None),
    ],
)  # fmt: skip
def test_tars_name_their_split_anywhere(name, kind):
    assert split_of_file(name) == kind


def test_a_class_called_train_is_a_class(tmp_path, caplog):
    write(tmp_path, *(f"{name}/{i}.jpg" for name in ("bus", "car", "train", "truck") for i in range(8)))
    source = detect_source(tmp_path)
    assert (len(source), source.classes) == (32, ["bus", "car", "train", "truck"])
    assert source.labels.tolist() == [i // 8 for i in range(32)]
    assert (
        "train is read as a class, because bus, car, truck hold images, too."
        f" For that folder alone give {tmp_path}/train" in caplog.text
    )
    assert len(detect_source(tmp_path / "train")) == 8


@pytest.mark.parametrize("name", ["test", "val", "Train", "train2017"])
def test_any_split_alone_among_classes_is_a_class(tmp_path, name):
    write(tmp_path, "bus/1.jpg", f"{name}/2.jpg")
    assert detect_source(tmp_path).classes == sorted(["bus", name])


def test_a_tar_that_macos_made_turns_no_class_into_a_split(tmp_path):
    write(tmp_path, "cats/1.jpg", "dogs/2.jpg", "test/3.jpg", "test/._archive.tar")
    assert detect_source(tmp_path).classes == ["cats", "dogs", "test"]


def test_classes_with_folders_in_them_are_classes_too(tmp_path):
    write(tmp_path, "bus/day/1.jpg", "train/day/2.jpg", "train/night/3.jpg")
    assert detect_source(tmp_path).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("files", [("train/n1/1.jpg", "pictures/2.jpg"), ("train/1.jpg", "pictures/n1/2.jpg")])
def test_a_split_or_class_that_is_built_otherwise_than_its_neighbours_is_refused(tmp_path, files):
    write(tmp_path, *files)
    with pytest.raises(
        DataError, match=rf"train may be a split or a class\. For the split give {tmp_path}/train; for cl"
    ):
        detect_source(tmp_path)
    assert len(detect_source(tmp_path / "train")) == 1


def test_train_beside_val_and_test_is_taken_and_the_log_says_what_is_not(tmp_path, caplog):
    write(tmp_path, "train/n1/1.jpg", "val/n1/2.jpg", "val/n1/3.jpg", "test/4.jpg", "Annotations/1.xml")
    (tmp_path / "ImageSets").mkdir()
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        assert names_of(tmp_path) == ["n1/1.jpg"]
    assert caplog.messages == [f"{tmp_path}: read: train/; left out: val/ (2 images), test/ (1 images)"]
    assert caplog.records[0].levelno == logging.INFO


def test_what_else_lies_beside_the_splits_is_a_warning(tmp_path, caplog):
    write(tmp_path, "train/n1/1.jpg", "val/n1/2.jpg", "extra/3.jpg", "loose.jpg", "readme.txt")
    assert names_of(tmp_path) == ["n1/1.jpg"]
    assert "read: train/; left out: val/ (1 images), extra/ (1 images), 1 images in no folder" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_many_folders_beside_the_splits_are_counted_together(tmp_path, caplog):
    write(tmp_path, "train/n1/1.jpg", "val/n1/2.jpg", *(f"x{i:02d}/{j}.jpg" for i in range(11) for j in range(i)))
    names_of(tmp_path)
    assert "x07/ (7 images), 3 more folders (27 images)" in caplog.text


def test_junk_beside_a_train_folder_alone_does_not_make_it_a_class(tmp_path, caplog):
    write(tmp_path, "train/n1/1.jpg", "Annotations/n1/1.xml", ".ipynb_checkpoints/1.jpg", "__MACOSX/2.jpg")
    assert names_of(tmp_path) == ["n1/1.jpg"]
    assert not caplog.text


@pytest.mark.parametrize(
    ("folders", "meant"),
    [
        (["Train", "Val"], "Train"),
        (["train2017", "val2017", "test2017"], "train2017"),
        (["train2017", "val2017", "unlabeled2017"], "train2017"),
        (["Training", "Testing"], "Training"),
        (["training", "validation", "extra"], "training"),
        (["val", "test"], "test"),
        (["Data/CLS-LOC/train", "Data/CLS-LOC/val", "Data/CLS-LOC/test"], "Data/CLS-LOC/train"),
        (["images/train", "images/val", "labels/none"], "images/train"),
        (["n1/train", "n1/test"], "n1/train"),
    ],
)
def test_a_root_of_several_splits_is_refused_with_the_path_to_give(tmp_path, folders, meant):
    write(tmp_path, *(f"{folder}/n1/{i}.jpg" for i, folder in enumerate(folders)))
    with pytest.raises(DataError, match=r"holds several splits \(.*Give one of them: (\S+)\. \(To") as error:
        detect_source(tmp_path)
    assert f"Give one of them: {tmp_path}/{meant}. (" in str(error.value)
    assert len(detect_source(tmp_path / meant)) == 1


def test_splits_within_every_class_are_refused_with_the_list_to_write(tmp_path):
    write(tmp_path, "bottle/train/good/1.png", "bottle/test/bad/2.png", "cable/train/3.png", "cable/test/4.png")
    with pytest.raises(
        DataError, match=r"holds 2 folders with several splits each, such as bottle/test/, bottle/train/:"
    ) as error:
        detect_source(tmp_path)
    assert f"cd {tmp_path} && find . -type f -path '*/train/*' | grep " in str(error.value)
    (command,) = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    subprocess.run(["bash", "-c", command], check=True)
    assert sorted(names_of(tmp_path / "list.txt")) == ["./bottle/train/good/1.png", "./cable/train/3.png"]


def test_a_lone_folder_in_another_spelling_is_the_split(tmp_path):
    write(tmp_path, "Train/n1/1.jpg", "Train/n2/2.jpg", "notes/readme.txt")
    assert detect_source(tmp_path).classes == ["n1", "n2"]


def test_other_splits_are_what_they_were(tmp_path):
    write(tmp_path, "val/n1/1.jpg", "train/n1/2.jpg", "bus/3.jpg")
    assert names_of(tmp_path / "val") == ["n1/1.jpg"]
    assert detect_source(tmp_path, "val").name(0) == "n1/1.jpg"
    assert len(detect_source(tmp_path, "all")) == 3


def test_a_converted_split_is_a_split_whatever_lies_beside_it(tmp_path, caplog):
    write(tmp_path, "train/manifest.json", "val/manifest.json")
    caplog.set_level(logging.INFO, "spark_fast.pipelines")
    assert train_folder(tmp_path) == tmp_path / "train"
    assert not caplog.text
    write(tmp_path, "pictures/1.jpg")
    assert train_folder(tmp_path) == tmp_path / "train"
    assert caplog.messages == [f"{tmp_path}: read: train/; left out: pictures/ (1 images)"]


def test_one_kind_of_split_in_several_places_is_no_mix(tmp_path):
    refuse_mixed_splits(tmp_path, ["a/train", "b/train", "c", ""])
    with pytest.raises(DataError, match="several splits"):
        refuse_mixed_splits(tmp_path, ["a/train", "a/valid/x"])
