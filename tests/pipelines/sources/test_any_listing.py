"""Folder trees, lists and tars drawn at random, against small oracles that know what was drawn.

Whatever is drawn is read right or refused with a DataError: no other exception, no label of another image, and every
file that is left out is counted in what is said.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import tarfile
from pathlib import Path

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.detect import detect_source, images_to_convert

FEW = range(50)
MANY = range(1000, 1600)
every_few = pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
IMAGES = ("jpg", "JPEG", "png", "jfif", "webp", "jpe")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "spark_fast.pipelines")
    return caplog


def answer(read, path: Path):
    """The source that is read, or None, and the message of the refusal."""
    try:
        return read(path), ""
    except DataError as error:
        return None, str(error)


# Folder trees

CLASSES = ("bus", "car 2", "n01", "ü", "b,c")
MACHINE = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".git")
SPLITS = {"train": 0, "Train": 0, "train2017": 0, "val": 1, "validation": 1, "test": 2}  # and their kinds


def grow(rng: random.Random, root: Path, depth: int = 0) -> None:
    """Folders, images and other files below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for _ in range(rng.randrange(4)):
        name = rng.choice(["1", "a b", "x.y", "#", "é"])
        end = rng.choice([*IMAGES, "txt", "json", "npy", "JPG.txt"])
        (root / f"{rng.choice(['', '', '', '._'])}{name}.{end}").write_bytes(b"")
    if depth < 3:
        pool = [*CLASSES, *CLASSES, rng.choice(MACHINE), *rng.sample(list(SPLITS), rng.choice([0, 0, 1, 2]))]
        for name in rng.sample(pool, rng.randrange(5 - depth)):
            grow(rng, root / name, depth + 1)


def tie(rng: random.Random, root: Path) -> None:
    """Links between these folders, to folders above, elsewhere, and nowhere."""
    folders = [Path(where) for where, _, _ in os.walk(root)]
    targets = [*folders, root.parent, root.parent / "elsewhere", root / "nowhere"]
    for i in range(rng.randrange(4)):
        path = rng.choice(folders) / f"link{i}"
        target = rng.choice(targets)
        path.symlink_to(os.path.relpath(target, path.parent) if rng.random() < 0.5 else target)


def machine_made(name: str) -> bool:
    return name.startswith(".") or name in MACHINE


def reachable(root: Path) -> tuple[set[str], int, int]:
    """Real paths of the images that can be reached from `root`, and how many other files and hidden ones there are."""
    above = {str(path) for path in root.resolve().parents}
    seen, todo, images, others, hidden = set(), [os.path.realpath(root)], set(), 0, 0
    while todo:
        folder = todo.pop()
        if folder in seen or folder in above:
            continue
        seen.add(folder)
        for path in Path(folder).iterdir():
            if path.is_dir():
                todo += [] if machine_made(path.name) else [os.path.realpath(path)]
            elif machine_made(path.name):
                hidden += 1
            elif path.name.lower().endswith(tuple(f".{end.lower()}" for end in IMAGES)):
                images.add(str(path))
            else:
                others += not path.is_symlink()
    return images, others, hidden


def numbers(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


@every_few
def test_any_tree_of_folders_is_listed_once_and_what_is_left_out_is_counted(tmp_path, said, seeds):
    outcomes = {"read": 0, "refused": 0}
    for seed in seeds:
        rng = random.Random(seed)
        place = tmp_path / str(seed)
        grow(rng, place / "elsewhere", 2)
        root = place / "data"
        grow(rng, root)
        tie(rng, root)
        said.clear()
        source, refusal = answer(detect_source, root)
        if source is None:
            outcomes["refused"] += 1
            assert re.search(r"no images in|several splits|split or a class", refusal), seed
            assert "no images in" not in refusal or (root / "train").is_dir() or not reachable(root)[0], seed
        else:
            outcomes["read"] += 1
            check_tree(source, root, said.text, seed)
    assert min(outcomes.values()) > len(seeds) // 10


def check_tree(source, root: Path, text: str, seed: int) -> None:
    taken = Path(source.root)
    names = [os.fsdecode(source.path(i)) for i in range(len(source))]
    found = [os.path.realpath(taken / name) for name in names]
    assert len(set(found)) == len(found), f"{seed}: an image is listed twice"
    expected, others, hidden = reachable(taken)
    assert set(found) <= expected, seed
    assert len(found) + numbers(r"(\d+) images outside the class", text) == len(expected), seed
    assert numbers(r"(\d+) files by extension", text) == others, seed
    assert numbers(r"system: (\d+) files", text) == hidden, seed
    if taken != root:
        beside = {path.name for path in root.iterdir() if path.is_dir() and reachable(path)[0]}
        left = beside - {taken.name} - set(MACHINE)
        assert {name for name in left if f"{name}/ (" in text} == left, seed
        loose = [path for path in root.iterdir() if path.is_file() and str(path) in reachable(root)[0]]
        assert numbers(r"(\d+) images in no folder", text) == len(loose), seed
    if source.labels is not None:
        assert [source.classes[label] for label in source.labels] == [name.split("/")[0] for name in names], seed
        assert source.classes == sorted(source.classes), seed
    kinds: dict[str, set[int]] = {}
    for name in names:
        for parent, _, child in ((name[: m.start()].rpartition("/")) for m in re.finditer("/", name)):
            if child in SPLITS:
                kinds.setdefault(parent, set()).add(SPLITS[child])
    assert all(len(found) == 1 for found in kinds.values()), f"{seed}: splits are mixed"


# Lists


def rendered(rng: random.Random, rows: list[tuple[str, str | None]], folder: Path) -> tuple[bytes, list[int]]:
    """A list of these rows in one of the ways in which lists are written, and the line of each row."""
    header = rng.random() < 0.3
    between = rng.choice([",", ";", "\t"] if header else [",", ";", "\t", " ", "  ", ", "])
    lines = [rng.choice(["path", "filename", "image"]) + (f"{between}label" if rows[0][1] is not None else "")] * header
    at = []
    for path, label in rows:
        if rng.random() < 0.1:
            lines.append(rng.choice(["", "   ", "# a comment"]))
        shown = str(folder / path) if rng.random() < 0.2 else path
        quoted = between.strip() and (rng.random() < 0.1 or (header and between.strip() in shown))
        lines.append(f'"{shown}"' if quoted else shown)
        lines[-1] += "" if label is None else between + label
        at.append(len(lines))
    text = rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])
    return rng.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode(), at


@every_few
def test_any_list_is_read_as_it_was_meant_or_refused_at_the_line(tmp_path, said, seeds):
    paths = ["0.jpg", "a b/1.PNG", "a b/x, y.jfif", "c/ü 2.jpeg", "c/3.4.jpg", "c/#5.webp", "n 7 8.jpg"]
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    pools = [None, ["0", "1", "17", "21840"], ["cat", "dog", "golden retriever", "n01440764"]]
    faults = ["-1", "2000000000", "1.5", "", "odd one out"]
    for seed in seeds:
        rng = random.Random(seed)
        pool = rng.choice(pools)
        rows = [(rng.choice(paths), None if pool is None else rng.choice(pool)) for _ in range(rng.randrange(1, 9))]
        bad = None
        if pool and pool[0] == "0" and len(rows) > 1 and rng.random() < 0.3:
            bad = rng.randrange(1, len(rows))
            rows[bad] = (rows[bad][0], rng.choice(faults))
        content, at = rendered(rng, rows, tmp_path)
        (tmp_path / "list.txt").write_bytes(content)
        if bad is not None:
            with pytest.raises(DataError, match=rf"line {at[bad]}\b"):
                detect_source(tmp_path / "list.txt")
            continue
        said.clear()
        source = detect_source(tmp_path / "list.txt")
        assert [source.read(i).decode() for i in range(len(source))] == [path for path, _ in rows], (seed, content)
        if pool is None:
            assert source.labels is None, (seed, content)
        else:
            names = [source.classes[label] if source.classes else str(label) for label in source.labels]
            assert names == [label for _, label in rows], (seed, content)
        assert numbers(r"(\d+) lines are comments", said.text) == content.count(b"# a comment"), seed


@every_few
def test_any_damage_to_a_list_ends_in_an_answer(tmp_path, seeds):
    (tmp_path / "0.jpg").write_bytes(b"0")
    noise = [b"", b"\0", b"\xff\xfe", b",", b'"', b"\t", b" -", b"\r", b"#", b"9" * 30]
    whole = b'path,label\n0.jpg,1\n"0.jpg",2\n# x\n\n./0.jpg,3\n' * 3
    for seed in seeds:
        rng = random.Random(seed)
        data = bytearray(whole[rng.choice([0, 11, 19]) :])
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice(noise)
        (tmp_path / "list.txt").write_bytes(data)
        source, refusal = answer(detect_source, tmp_path / "list.txt")
        assert "list.txt" in refusal if source is None else source.labels is None or len(source.labels) == len(source)


# Tars


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def samples_of(rng: random.Random, first: int, count: int, labelled: bool, folder: str) -> list[tuple[str, bytes]]:
    """The members of a tar in WebDataset's layout; an image's content is its number, its label that modulo 3."""
    members = []
    image = rng.choice(IMAGES)
    for i in range(first, first + count):
        key = f"{folder}{rng.choice(['', 'x.y'])}{i:05d}"
        sample = [(f"{key}.{image}", b"%d" % i)]
        sample += [(f"{key}.cls", b"%d" % (i % 3) + rng.choice([b"", b"\n"]))] if labelled else []
        sample += [(f"{key}.{end}", b"{}") for end in ("json", "txt") if not labelled or rng.random() < 0.3]
        rng.shuffle(sample)
        members += sample
    return members


@every_few
def test_any_tars_of_samples_have_the_labels_of_their_cls(tmp_path, said, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        labelled, count, folder = rng.random() < 0.7, rng.randrange(1, 6), rng.choice(["", "", "n01/", "a/b/"])
        tars = [samples_of(rng, count * s, count, labelled, folder) for s in range(rng.randrange(1, 4))]
        names = [rng.choice(["{:05d}.tar", "in-train-{:04d}.tar", "n{:08d}.tar"]).format(s) for s in range(len(tars))]
        root = tmp_path / str(seed)
        root.mkdir()
        form = rng.choice(["folder", "tars", "one"] if labelled else ["folder", "tars"])
        if form == "folder":
            for name, members in zip(names, tars, strict=True):
                (root / name).write_bytes(tar_of(members))
        elif form == "tars":
            (root / "all.tar").write_bytes(tar_of([(n, tar_of(m)) for n, m in zip(names, tars, strict=True)]))
        else:
            (root / "all.tar").write_bytes(tar_of([member for members in tars for member in members]))
        if form == "folder" and len({"train" in name for name in names}) > 1:
            with pytest.raises(DataError, match="tars of several splits, and"):
                detect_source(root)
            continue
        said.clear()
        source = rng.choice([detect_source, images_to_convert])(root if form == "folder" else root / "all.tar")
        numbered = [int(source.read(i)) for i in range(len(source))]
        assert sorted(numbered) == list(range(count * len(tars))), (seed, form)
        assert source.classes == [], (seed, form)
        right = [number % 3 for number in numbered] if labelled else None
        assert (None if source.labels is None else source.labels.tolist()) == right, (seed, form)
        others = sum(name.endswith((".json", ".txt")) for members in tars for name, _ in members)
        assert numbers(r"(\d+) files by extension", said.text) == others, (seed, form)


@every_few
def test_any_tar_of_class_tars_or_folders_has_the_classes_of_its_names(tmp_path, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        classes = rng.sample(["n01", "n02", "bus", "train", "ü"], rng.randrange(1, 5))
        images = {name: [(f"{i}.{rng.choice(IMAGES)}", f"{name} {i}".encode()) for i in range(rng.randrange(1, 4))]
                  for name in classes}  # fmt: skip
        if rng.random() < 0.5:
            members = [(f"{name}.tar", tar_of(found)) for name, found in images.items()]
        else:
            members = [(f"{name}/{image}", content) for name, found in images.items() for image, content in found]
        (tmp_path / "some.tar").write_bytes(tar_of(members))
        source = images_to_convert(tmp_path / "some.tar")
        assert source.classes == sorted(classes), seed
        contents = [source.read(i).decode() for i in range(len(source))]
        assert [source.classes[label] for label in source.labels] == [content.split()[0] for content in contents]
        assert len(contents) == sum(map(len, images.values())), seed


@every_few
def test_any_damage_to_a_tar_ends_in_an_answer(tmp_path, seeds):
    path = tmp_path / "some.tar"
    for seed in seeds:
        rng = random.Random(seed)
        members = samples_of(rng, 0, 3, labelled=True, folder="")
        whole = tar_of([("0.tar", tar_of(members))] if rng.random() < 0.5 else members)
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(6)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        for read in (detect_source, images_to_convert):
            source, refusal = answer(read, path)
            assert "some.tar" in refusal if source is None else all(map(source.read, range(len(source)))), seed
