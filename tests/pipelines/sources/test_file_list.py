from __future__ import annotations

import codecs
import logging
import os

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.file_list import list_source
from tests.pipelines.sources.listing import write


def source_of(folder, text: str | bytes, name="list.txt"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list_source(folder / name)


def rows(source):
    names = [source.name(i) for i in range(len(source))]
    return names if source.labels is None else list(zip(names, source.labels.tolist(), strict=True))


@pytest.fixture
def images(tmp_path):
    return write(tmp_path, "0.jpg", "1.jpg", "my pictures/b 2.jpg", "a, b.jpg", "no_ending", "#3.jpg")


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf0.jpg 4\r\n1.jpg 0\r\n",
        codecs.BOM_UTF16_LE + "0.jpg 4\r\n1.jpg 0".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "0.jpg\t4\n1.jpg\t0".encode("utf-16-be"),
        b"0.jpg 4\r1.jpg 0",
        b"0.jpg,4\n1.jpg,0\n",
        b"0.jpg , 4\n\n1.jpg ;0\n\n",
        b"0.jpg;4\n1.jpg;0\n",
        b"path,label\n0.jpg,4\n1.jpg,0\n",
        b"\xef\xbb\xbfpath,label\r\n0.jpg,4\r\n1.jpg,0\r\n",
        b"label\tfilename\n4\t0.jpg\n0\t1.jpg\n",
        b"image label\n0.jpg 4\n1.jpg 0\n",
        b"width,image_id,class\n640,0.jpg,4\n480,1.jpg,0\n",
        b'"0.jpg",4\n"1.jpg", 0\n',
        b"# images and labels\n0.jpg 4\n  # more\n1.jpg 0",
        b"0.jpg     4\n1.jpg \t 0\n",
    ],
)
def test_one_list_in_many_spellings(images, text):
    assert rows(source_of(images, text)) == [("0.jpg", 4), ("1.jpg", 0)]


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("my pictures/b 2.jpg", "my pictures/b 2.jpg"),
        ("my pictures/b 2.jpg 7", ("my pictures/b 2.jpg", 7)),
        ("a, b.jpg", "a, b.jpg"),
        ("a, b.jpg 7", ("a, b.jpg", 7)),
        ("a, b.jpg,7", ("a, b.jpg", 7)),
        ('"a, b.jpg",7', ("a, b.jpg", 7)),
        ("#3.jpg", "#3.jpg"),
        ("#3.jpg 7", ("#3.jpg", 7)),
        ("no_ending", "no_ending"),
        ("no_ending 7", ("no_ending", 7)),
        ("no_ending\t7", ("no_ending", 7)),
        ("./0.jpg", "./0.jpg"),
        ("0.jpg +7", ("0.jpg", 7)),
    ],
)
def test_paths_keep_their_spaces_commas_and_hashes(images, line, row):
    assert rows(source_of(images, line)) == [row]
    assert source_of(images, line).read(0).startswith(b"image")


def test_without_labels_a_table_needs_its_paths_alone(images):
    assert rows(source_of(images, "path\n0.jpg\n1.jpg\n")) == ["0.jpg", "1.jpg"]
    assert rows(source_of(images, 'file_name,note\n0.jpg,"a, b"\n"a, b.jpg",\n')) == ["0.jpg", "a, b.jpg"]


def test_columns_that_are_not_read_are_named(images, caplog):
    source_of(images, "width,image,label\n640,0.jpg,4\n")
    assert "the columns width are left out" in caplog.text


def test_names_of_classes_are_numbered_in_sorted_order(images, caplog):
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        source = source_of(images, "1.jpg golden retriever\n0.jpg cat\nmy pictures/b 2.jpg cat\n")
    assert rows(source) == [("1.jpg", 1), ("0.jpg", 0), ("my pictures/b 2.jpg", 0)]
    assert source.classes == ["cat", "golden retriever"]
    assert "labels are names: 2 classes" in caplog.text
    assert source_of(images, "path,label\n0.jpg,b\n1.jpg,a\n").labels.tolist() == [1, 0]


def test_absolute_paths_within_the_folder_are_read(images, tmp_path_factory, monkeypatch):
    assert rows(source_of(images, f"{images}/0.jpg 3\n{images}/x/../1.jpg 2\n")) == [("0.jpg", 3), ("1.jpg", 2)]
    other = tmp_path_factory.mktemp("other") / "link"
    other.symlink_to(images)
    assert rows(source_of(other, f"{images}/0.jpg\n{other}/1.jpg\n")) == ["0.jpg", "1.jpg"]
    assert rows(source_of(images, f"{other}/my pictures/b 2.jpg\n")) == ["my pictures/b 2.jpg"]
    monkeypatch.chdir(images)
    assert rows(list_source((images / "list.txt").relative_to(images))) == ["my pictures/b 2.jpg"]
    beside = images.with_name(images.name + "_more")
    with pytest.raises(DataError, match=r"list.txt, line 1: '.*_more/0.jpg' lies outside the list's folder"):
        source_of(images, f"{beside}/0.jpg\n")


def test_an_image_listed_again_counts_again_and_is_told(images, caplog):
    assert rows(source_of(images, "0.jpg 1\n1.jpg 1\n0.jpg 1\n0.jpg 2\n")) == [
        ("0.jpg", 1), ("1.jpg", 1), ("0.jpg", 1), ("0.jpg", 2),
    ]  # fmt: skip
    assert "2 lines repeat an image, 1 of them with another label; each line counts" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.jpg -1\n1.jpg 0\n", "line 1, column 7: label '-1' is negative, .* leave out all labels"),
        ("0.jpg 1\n1.jpg 2000000000\n", "line 2, column 7: label '2000000000' is too large"),
        ("0.jpg 1\n\n# x\n1.jpg 99999999999999999999\n", "line 4, column 7: label '9+' is too large"),
        ("0.jpg 1\n1.jpg\n", r"line 2: either all lines have a label or none; this differs \(column 6\)"),
        ("0.jpg\n1.jpg 1\n", r"line 2: either all lines have a label or none; this differs \(column 7\)"),
        ("0.jpg 1\n1.jpg cat\n", "line 2, column 7: label 'cat' is not a number"),
        ("0.jpg cat\nü 1.jpg 1\n", "line 2, column 9: label '1' is a number"),
        ("0.jpg 1.0\n", "line 1, column 7: label '1.0' is not a whole number"),
        ("0.jpg,\n1.jpg,1\n", "line 1, column 7: label '' is missing"),
        ("0.jpg,1,2\n", r"line 1, column 9: more than a path and a label: '0.jpg,1,2'. .*`path` and `label`"),
        (b"0.jpg 1 \xff 30\n", "line 1, column 9: more than a path and a label"),
        (b"0.jpg \xff,3,4\n", "do not exist"),
        ("0.jpg " + "9" * 300, "line 1, column 7: label '9{40}' is too large"),
        ("x" * 5000, "do not exist"),
        ("0.jpg 1 20 30\n", "line 1, column 9: more than a path and a label"),
        ('"0.jpg",1,2\n', "line 1, column 9: more than a path"),
        ("path,label\n0.jpg,1\n1.jpg\n", "line 3, column 2: there are 1 columns, but the first line names 2"),
        ("path,label\na, b.jpg,1\n", "line 2, column 3: there are 3 columns, .*Put .* in double quotes"),
        ("path,label\n0.jpg,-1\n", "line 2, column 2: label '-1' is negative"),
        ("path,label\n,1\n", "line 2: no path"),
        ("path,image,label\n0.jpg,1.jpg,1\n", "line 1, column 2: the columns 'path' and 'image' are ambiguous"),
        ("path,label\n", "is empty"),
        ("# nothing\n\n", "is empty"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8", "begins as UTF-16 text, but"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused_with_line_and_column(images, text, message):
    with pytest.raises(DataError, match=rf"list.txt.*{message}"):
        source_of(images, text)


def test_comments_may_be_long(images):
    assert rows(source_of(images, "#" + "-" * 5000 + "\n0.jpg\n")) == ["0.jpg"]


def test_undecodable_paths_are_read(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"1")
    assert source_of(tmp_path, b"\xff.jpg,3\n").read(0) == b"1"
