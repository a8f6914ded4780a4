from __future__ import annotations

import logging
from pathlib import Path

import pytest

from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.listing.image_names import LeftOut, ending, is_image, is_machine_made, listed
from tests.pipelines.sources.listing import names_of, write


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.jfif", "a.JPE", "a.b.webp", "a b.tif"])
def test_images_are_told_by_their_ending(name):
    assert is_image(name)
    assert not is_machine_made(name)


@pytest.mark.parametrize("name", ["._a.jpg", ".a.jfif", "a.jpg.txt", "jpg", "a.npy", "a.jpg~"])
def test_other_files_are_no_images(name):
    assert not is_image(name)


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000", "lost+found", "$RECYCLE.BIN", ".git", ".thumbnails",
     "Thumbs.db", ".DS_Store", "desktop.ini", "System Volume Information"],
)  # fmt: skip
def test_what_machines_leave_behind_is_known(name):
    assert is_machine_made(name)


def test_endings_are_those_that_a_reader_would_name():
    names = ["a.TXT", "a.tar.gz", "README", "a.b.c", ".hidden"]
    assert [ending(name) for name in names] == [".txt", ".tar.gz", "no ending", ".c", "no ending"]


def test_long_enumerations_are_cut_and_strange_names_printable():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert listed(["\udcff"]).encode("utf-8")


def test_what_is_left_out_is_counted_by_ending_the_commonest_first():
    left_out = LeftOut()
    for name in ("a.txt", "b.TXT", "c.json", "README", "Thumbs.db", ".x"):
        left_out.file(name)
    left_out.folder("@eaDir")
    left_out.folder("@eaDir")
    assert left_out.describe() == (
        "4 files by extension: .txt (2), .json (1), no ending (1); hidden or system: 2 files and 2 folders (@eaDir)"
    )
    assert LeftOut().describe() == ""


def test_jfif_and_jpe_are_read_and_other_endings_named_once(tmp_path, caplog):
    write(tmp_path, "a/1.jfif", "a/2.jpe", "a/3.jpg", "a/4.heic", "b/5.jpg", "b/6.npy", "b/7.npy", "b/.DS_Store")
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        assert names_of(tmp_path) == ["a/1.jfif", "a/2.jpe", "a/3.jpg", "b/5.jpg"]
    told = f"{tmp_path}: left out: 3 files by extension: .npy (2), .heic (1); hidden or system: 1 files"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert caplog.records[0].levelno == logging.WARNING


def test_machine_made_folders_are_no_classes_at_any_depth(tmp_path, caplog):
    write(tmp_path, "a/1.jpg", "b/deep/2.jpg", "a/.ipynb_checkpoints/1-checkpoint.jpg", "b/deep/@eaDir/2.jpg/t.jpg")
    write(tmp_path, "__MACOSX/a/._1.jpg", "$RECYCLE.BIN/9.jpg", ".git/x.jpg", "lost+found/y.jpg")
    (tmp_path / "lost+found").chmod(0)  # as root's is
    try:
        with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
            source = detect_source(tmp_path)
    finally:
        (tmp_path / "lost+found").chmod(0o700)
    assert [source.name(i) for i in range(len(source))] == ["a/1.jpg", "b/deep/2.jpg"]
    assert (source.labels.tolist(), source.classes) == ([0, 1], ["a", "b"])
    folders = "6 folders ($RECYCLE.BIN, .git, .ipynb_checkpoints, @eaDir, __MACOSX, lost+found)"
    assert caplog.messages == [f"{tmp_path}: left out: hidden or system: {folders}"]
    assert caplog.records[0].levelno == logging.INFO


def test_the_folder_given_may_be_hidden_itself(tmp_path: Path):
    assert names_of(write(tmp_path / ".cache", "a/1.jpg")) == ["a/1.jpg"]
