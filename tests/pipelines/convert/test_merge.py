from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spark_fast.errors import DataError, SettingsError, StorageError
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert, convert_part
from spark_fast.pipelines.convert.conversion_parts import Part
from spark_fast.pipelines.convert.merge import merge
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import MANIFEST
from tests.pipelines.convert.test_conversion import contents, stopped_after
from tests.pipelines.tars import tar_of, tar_of_tars

SETTINGS = ConvertSettings(Reencode(short_side=40), images_per_shard=5)


@pytest.fixture
def images(image_folder) -> Path:
    """24 labelled training images, one of them broken, and 6 unlabelled ones."""
    root = image_folder()
    (root / "train/n0001/0010.JPEG").write_bytes(b"broken")
    (root / "val").mkdir()
    for i, path in enumerate(sorted((root / "train").rglob("*.JPEG"))[:6]):
        shutil.copy(path, root / "val" / f"{i}.JPEG")
    return root


@pytest.fixture
def tars(images, tmp_path) -> Path:
    """The same as the downloaded tars."""
    root = tmp_path / "tars"
    root.mkdir()
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of_tars(images / "train"))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of({p.name: p.read_bytes() for p in (images / "val").iterdir()}))
    return root


@pytest.fixture
def whole(images, tmp_path) -> dict[str, bytes]:
    """What one machine makes of the images."""
    convert(images, tmp_path / "whole", SETTINGS)
    return contents(tmp_path / "whole")


def convert_parts(src: Path, dst: Path, of: int, *, without: int = 0) -> None:
    for number in range(1, of + 1):
        if number != without:
            convert_part(src, dst, SETTINGS, Part(number, of))


@pytest.mark.slow
def test_the_tars_convert_to_the_bytes_of_the_unpacked_folder(tars, whole, tmp_path):
    convert(tars, tmp_path / "out", SETTINGS, workers=2)
    assert contents(tmp_path / "out") == whole
    convert(tars / "ILSVRC2012_img_val.tar", tmp_path / "val", SETTINGS)
    assert contents(tmp_path / "val") == {n.removeprefix("val/"): b for n, b in whole.items() if n.startswith("val/")}


@pytest.mark.slow
@pytest.mark.parametrize("of", [1, 2, 3, 7])  # seven: more than there are shards
@pytest.mark.parametrize("kind", ["images", "tars"])
def test_parts_merge_to_the_bytes_of_one_machine(request, whole, tmp_path, kind, of):
    src = request.getfixturevalue(kind)
    convert_parts(src, tmp_path / "out", of)
    with pytest.raises(DataError, match="the conversion was not finished"):
        detect_source(tmp_path / "out")
    written = merge(tmp_path / "out")
    assert [(folder.name, manifest.count) for folder, manifest in written] == [("train", 23), ("val", 6)]
    assert contents(tmp_path / "out") == whole
    assert all(verify_shards(folder) == [] for folder, _ in written)
    assert merge(tmp_path / "out") == written  # and again
    assert len(convert_part(src, tmp_path / "out", SETTINGS, Part(1, of))) == 2  # nothing to do
    assert contents(tmp_path / "out") == whole


def test_parts_made_in_folders_of_their_own_merge_when_copied_together(images, whole, tmp_path):
    for number in (1, 2):
        convert_part(images, tmp_path / str(number), SETTINGS, Part(number, 2))
        shutil.copytree(tmp_path / str(number), tmp_path / "out", dirs_exist_ok=True)
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_conversion_of_the_whole_goes_on_from_parts(images, whole, tmp_path):
    convert_parts(images, tmp_path / "out", 3, without=2)
    done = []
    convert(images, tmp_path / "out", SETTINGS, on_progress=lambda progress: done.append(progress.done))
    assert done[0] > 10
    assert contents(tmp_path / "out") == whole


def test_a_flat_folder_merges_without_splits(images, tmp_path):
    convert(images / "val", tmp_path / "whole", SETTINGS)
    convert_parts(images / "val", tmp_path / "out", 2)
    ((folder, manifest),) = merge(tmp_path / "out")
    assert (folder, manifest.count, manifest.labelled) == (tmp_path / "out", 6, False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 6, 8])
def test_an_interrupted_part_goes_on_and_leaves_the_others_alone(tars, whole, tmp_path, stop_after):
    convert_parts(tars, tmp_path / "out", 3, without=2)
    others = contents(tmp_path / "out")
    with stopped_after(stop_after) as stop:
        convert_part(tars, tmp_path / "out", SETTINGS, Part(2, 3), on_progress=stop)
    shard = tmp_path / "out/train/shard-000004.tar"
    shard.with_name(shard.name + ".partial").write_bytes(b"of a killed process")
    shard.write_bytes(b"renamed, but its report was never written")
    with pytest.raises(DataError, match=r"train: part 2/3 is missing"):
        merge(tmp_path / "out")
    convert_part(tars, tmp_path / "out", SETTINGS, Part(2, 3))
    assert others.items() <= contents(tmp_path / "out").items()
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("at", ["index.npy", MANIFEST, "leftovers"])
def test_an_interrupted_merge_is_repeated(images, whole, tmp_path, monkeypatch, at):
    convert_parts(images, tmp_path / "out", 2)
    replace, unlink = Path.replace, Path.unlink

    def fail(path: Path, *arguments: object, **options: object) -> None:
        if at == "leftovers" and path.name.startswith("part-"):
            raise StopError
        unlink(path, *arguments, **options)  # type: ignore[arg-type]

    def stop(path: Path, target: Path) -> None:
        if target.name == at:
            raise StopError
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(StopError):
            merge(tmp_path / "out")
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_missing_parts_are_named_and_nothing_is_written(images, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        merge(tmp_path / "out")
    convert_part(images, tmp_path / "out", SETTINGS, Part(3, 4))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"train: part 1/4, 2/4, 4/4 is missing: run it"):
        merge(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out/val")
    convert_parts(images, tmp_path / "out", 4)
    shutil.rmtree(tmp_path / "out/val")
    with pytest.raises(DataError, match=r"train was converted together with val, but .* has no part of these"):
        merge(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no part is finished in"):
        merge(tmp_path / "empty")


def test_parts_made_otherwise_are_refused_with_the_difference(images, tmp_path):
    convert_part(images, tmp_path / "out", SETTINGS, Part(1, 2))
    other = ConvertSettings(SETTINGS.images, SETTINGS.images_per_shard, seed=1)
    convert_part(images, tmp_path / "out", other, Part(2, 2))
    with pytest.raises(DataError, match=r"part 2/2 was made with other settings than part 1/2 \(seed: 0 -> 1\)"):
        merge(tmp_path / "out")
    with pytest.raises(SettingsError, match=r"with other settings \(seed: 1 -> 0\)"):
        convert_part(images, tmp_path / "out", SETTINGS, Part(2, 2))
    for part in (Part(1, 2), Part(1, 3)):
        convert_part(images, tmp_path / "mixed", SETTINGS, part)
    with pytest.raises(DataError, match=r"parts of different divisions \(into \[2, 3\]\)"):
        merge(tmp_path / "mixed")


@pytest.mark.parametrize("damage", ["missing", "short", "no idx", "report", "other", "part"])
def test_incomplete_copies_are_named(images, tmp_path, damage):
    convert_parts(images, tmp_path / "out", 2)
    shard = tmp_path / "out/train/shard-000001.tar"
    report = shard.with_suffix(".json")
    expected = "shard-000001.tar"
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "no idx":
        shard.with_suffix(".idx").unlink()
    elif damage == "report":
        report.write_text("{")
    elif damage == "other":
        report.write_text(json.dumps(json.loads(report.read_text()) | {"made_from": {}}))
    else:
        (tmp_path / "out/train/part-0002-of-0002.json").write_text("{}")
        expected = r"part-0002-of-0002.json is damaged"
    with pytest.raises(DataError, match=expected):
        merge(tmp_path / "out")
    assert not list((tmp_path / "out").rglob(MANIFEST))


def test_parts_share_a_folder_but_each_runs_once_and_merge_waits(images, tmp_path):
    out = tmp_path / "out"
    met = []

    def meanwhile(progress) -> None:
        if progress.done != 3 or met:
            return
        met.append(progress)
        convert_part(images / "val", out, SETTINGS, Part(2, 2))
        for action in (
            lambda: convert_part(images / "val", out, SETTINGS, Part(1, 2)),
            lambda: convert(images / "val", out, SETTINGS),
            lambda: merge(out),
        ):
            with pytest.raises((StorageError, DataError), match=r"another conversion is writing|part 1/2 is missing"):
                action()

    convert_part(images / "val", out, SETTINGS, Part(1, 2), on_progress=meanwhile)
    merge(out)
    assert met
    assert verify_shards(out) == []
