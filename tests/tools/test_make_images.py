import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import HANG_SECONDS

COMMAND = Path(__file__).parents[2] / "tools" / "make_images.py"
TINY = ("--train", "5", "--val", "2", "--classes", "2", "--size", "48")


def make(dst, *more):
    return subprocess.run(
        [sys.executable, str(COMMAND), str(dst), *TINY, *more], capture_output=True, text=True, timeout=HANG_SECONDS
    )


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.JPEG"))
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "made"
    result = make(folder, "--workers", "1")
    assert result.returncode == 0, result.stderr
    return folder


def test_layout_is_imagenets_with_every_class_in_both_splits(made):
    names = [path.relative_to(made).parts for path in sorted(made.rglob("*.JPEG"))]
    assert [split for split, _, _ in names] == ["train"] * 5 + ["val"] * 2
    assert len({label for split, label, _ in names if split == "train"}) == 2
    assert {label for split, label, _ in names if split == "val"} == {label for _, label, _ in names}


def test_pictures_are_rgb_jpegs_of_about_the_size_with_many_colours(made):
    for path in made.rglob("*.JPEG"):
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert 0.9 * 48 - 1 <= min(picture.size) <= 1.15 * 48 + 1
            assert len(picture.convert("L").getcolors()) > 50


def test_same_seed_gives_the_same_bytes_with_any_number_of_processes(made, tmp_path):
    assert make(tmp_path / "again", "--workers", "3").returncode == 0
    assert digests(tmp_path / "again") == digests(made)


def test_another_seed_gives_other_pictures(made, tmp_path):
    make(tmp_path / "other", "--seed", "1")
    assert not set(digests(tmp_path / "other").values()) & set(digests(made).values())


def test_running_again_makes_only_what_is_missing(made):
    before = digests(made)
    next(iter(sorted(made.rglob("*.JPEG")))).unlink()
    assert "1 of them made now" in make(made).stdout
    assert "all made earlier" in make(made).stdout
    assert digests(made) == before


def test_other_arguments_are_refused(made):
    before = digests(made)
    result = make(made, "--seed", "7")
    assert result.returncode == 2
    assert "other arguments" in result.stderr
    assert digests(made) == before


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = make(tmp_path)
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
