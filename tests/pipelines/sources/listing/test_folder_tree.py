from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.listing.folder_tree import holds_images, read_tree
from tests.pipelines.sources.listing import names_of, write


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_links_to_a_folder_above_are_not_followed(tmp_path, caplog):
    write(tmp_path / "loop", "a/1.jpg", "b/1.jpg", "c/1.jpg", "d/1.jpg")
    for name in "abcd":
        link(tmp_path / "loop" / name / "up", "..")
    link(tmp_path / "loop" / "a" / "far_up", "../../..")
    source = detect_source(tmp_path / "loop")
    assert [source.name(i) for i in range(len(source))] == ["a/1.jpg", "b/1.jpg", "c/1.jpg", "d/1.jpg"]
    assert source.labels.tolist() == [0, 1, 2, 3]
    (told,) = caplog.messages
    assert "5 links are not followed: a/far_up (is " in told
    assert "d/up (is the folder itself)" in told


def test_links_to_each_other_and_to_themselves_end(tmp_path, caplog):
    write(tmp_path / "x", "a/1.jpg", "b/2.jpg")
    link(tmp_path / "x" / "a" / "to_b", "../b")
    link(tmp_path / "x" / "b" / "to_a", "../a")
    link(tmp_path / "x" / "self", "self")
    link(tmp_path / "x" / "gone", "nowhere")
    assert names_of(tmp_path / "x") == ["a/1.jpg", "b/2.jpg"]
    (told,) = caplog.messages
    assert all(part in told for part in ("4 links", "a/to_b (is b)", "b/to_a (is a)", "gone (leads nowhere)", "self ("))


def test_a_folder_elsewhere_is_listed_once_under_its_first_link(tmp_path, caplog):
    write(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    link(tmp_path / "x" / "b", tmp_path / "elsewhere")
    link(tmp_path / "x" / "c", tmp_path / "elsewhere")
    link(tmp_path / "elsewhere" / "deep" / "round", tmp_path / "x")
    write(tmp_path / "x", "a/0.jpg")
    source = detect_source(tmp_path / "x")
    assert [source.name(i) for i in range(len(source))] == ["a/0.jpg", "b/1.jpg", "b/deep/2.jpg"]
    assert (source.labels.tolist(), source.classes) == ([0, 1, 1], ["a", "b"])
    assert "2 links are not followed: c (is b), b/deep/round (is the folder itself)" in caplog.text


def test_two_links_into_one_tree_share_it(tmp_path):
    write(tmp_path / "pool", "1.jpg", "sub/2.jpg")
    link(tmp_path / "x" / "a", tmp_path / "pool" / "sub")
    link(tmp_path / "x" / "b", tmp_path / "pool")
    assert names_of(tmp_path / "x") == ["a/2.jpg", "b/1.jpg"]


def test_the_folder_itself_keeps_its_path_though_a_link_to_it_comes_first(tmp_path):
    write(tmp_path, "z/1.jpg")
    link(tmp_path / "a", "z")
    assert names_of(tmp_path) == ["z/1.jpg"]


def test_splits_made_of_links_into_a_pool_beside_them_are_followed(tmp_path, caplog):
    write(tmp_path, "pool/n1/1.jpg", "pool/n2/2.jpg", "val/n1/3.jpg")
    link(tmp_path / "train" / "n1", "../pool/n1")
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        assert names_of(tmp_path) == ["n1/1.jpg"]
    assert "read: train/; left out: val/ (1 images), pool/ (2 images)" in caplog.text


def test_a_link_to_a_file_is_the_file(tmp_path):
    write(tmp_path / "elsewhere", "1.jpg")
    link(tmp_path / "x" / "a" / "9.jpg", tmp_path / "elsewhere" / "1.jpg")
    source = detect_source(tmp_path / "x")
    assert (source.name(0), source.read(0)) == ("a/9.jpg", b"image 0")


def test_a_tree_says_which_folders_are_empty_and_whether_there_are_images(tmp_path):
    write(tmp_path, "a/b/c/1.jpg", "d/readme.txt")
    tree = read_tree(tmp_path)
    assert (tree.folders, tree.images, len(tree)) == (["a", "d"], {"a/b/c": [b"a/b/c/1.jpg"]}, 1)
    assert holds_images(tmp_path)
    assert not holds_images(tmp_path / "d")


def test_a_folder_that_cannot_be_listed_is_a_data_error(tmp_path, monkeypatch):
    write(tmp_path, "a/1.jpg")

    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list the images of .*Permission denied"):
        detect_source(tmp_path)
