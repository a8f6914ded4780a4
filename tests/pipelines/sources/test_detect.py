from __future__ import annotations

import shutil

import pytest

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.pipelines.sources.detect import TARS, detect_source, has_split
from tests.pipelines.building import build
from tests.pipelines.comparing import batches
from tests.pipelines.sources.listing import names_of, write


def test_the_folder_train_itself_and_class_folders_elsewhere_are_taken(image_folder):
    root = image_folder()
    inside = names_of(root)
    assert names_of(root / "train") == inside
    (root / "train").rename(root / "pictures")
    assert names_of(root / "pictures") == inside
    assert names_of(str(root / "pictures")) == inside


def test_a_missing_folder_is_named_with_its_nearest_parent(tmp_path):
    with pytest.raises(DataError, match=rf"nowhere/deep does not exist: {tmp_path} does, but holds no 'nowhere'"):
        detect_source(tmp_path / "nowhere" / "deep")


@pytest.mark.parametrize("left", ["shard-000000.tar.partial", "shard-000000.tar"])
def test_an_unfinished_conversion_is_never_opened(tmp_path, left):
    write(tmp_path, f"train/{left}", "train/x/a.jpg")
    with pytest.raises(DataError, match=r"no manifest.json: the conversion was not finished. Run .*again"):
        detect_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (["x.tar"], "x.tar", r"x.tar is a tar, .* Convert once: {convert} \S+/x.tar DST"),
        (["x.tar"], "", r"holds a tar, .*{convert} \S+/x.tar DST"),
        ([*TARS.values(), "LICENCE"], "", r"as downloaded \(ILSVRC2012_img_test.*{convert} {root} DST"),
        ([TARS["train"], "val/n1/a.jpg"], "", r"as downloaded \(.*_train.tar\).*{convert} {root} DST"),
        (["n1.tar", "n2.tar"], "", r"holds 2 tars \(n1.tar \.\.\.\), .*{convert} THE_TAR_THEY_WERE_IN DST"),
        (["train/n1.tar", "train/n1/a.jpg"], "", r"train holds a tar, .*If it is already unpacked, move"),
        (["shard-000000.tar"], "shard-000000.tar", r"is one shard of a conversion: give its folder, {root}$"),
    ],
)
def test_tars_of_images_are_refused_with_the_command_that_makes_them_usable(tmp_path, files, path, message):
    write(tmp_path, *files)
    with pytest.raises(
        DataError, match=message.replace("{root}", str(tmp_path)).replace("{convert}", command("convert"))
    ):
        detect_source(tmp_path / path)


def test_the_validation_split_is_read_and_its_absence_is_told(image_folder, tmp_path):
    root = image_folder()
    with pytest.raises(DataError, match=r"images holds no folder val/, which should be next to train/"):
        batches(root, split="val")
    with pytest.raises(DataError, match="holds no folder val/"):
        batches(root / "train", split="val")
    shutil.copytree(image_folder(8, name="other") / "train", root / "val")
    (root / "train").rename(root / "test")
    val = build(root, split="val", batch_size=4, input_size=32)
    all_of_it = build(root / "val", split="all", batch_size=4, input_size=32)
    assert (val.num_samples, val.num_classes, val.classes) == (8, 3, ["n0000", "n0001", "n0002"])
    assert all_of_it.num_samples == 8
    val.close(), all_of_it.close()


def test_a_file_is_no_place_for_a_validation_split(image_folder):
    root = image_folder(4)
    (root / "list.txt").write_text("".join(f"train/n{i * 3 // 4:04d}/{i:04d}.JPEG {i}\n" for i in range(4)))
    with pytest.raises(DataError, match=r"list.txt holds no folder val/"):
        batches(root / "list.txt", split="val", batch_size=2)
    listed = build(root / "list.txt", batch_size=2, input_size=32)
    assert (listed.num_classes, listed.classes) == (4, [])
    listed.close()


def test_a_split_is_a_folder_of_its_name_or_tars_that_are_named_after_it(tmp_path):
    assert not has_split(tmp_path, "val")
    assert not has_split(tmp_path / "nowhere", "val")
    (tmp_path / "imagenet1k-val-0000.tar").touch()
    assert has_split(tmp_path, "val")
    assert not has_split(tmp_path, "test")
    assert not has_split(tmp_path / "imagenet1k-val-0000.tar", "val")
    (tmp_path / "test").mkdir()
    assert has_split(tmp_path, "test")
