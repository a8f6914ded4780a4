"""Converted data flipped, cut short, and data sets of odd shape (faults 20 and 22)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.convert.beton_writer import BetonSettings
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import BETON
from tests.faults.band_kinds import RECORDS, folder_of, image
from tests.pipelines.bands import npy_of
from tests.pipelines.building import build
from tests.pipelines.comparing import batches
from tests.pipelines.pictures import jpeg
from tests.pipelines.sources.test_beton import flip


def read_all(path: Path) -> list[tuple[bytes, int] | str]:
    """Each image as training reads it with its label, or why it cannot be read."""
    source = detect_source(path)

    def read(i: int) -> tuple[bytes, int] | str:
        try:
            return bytes(source.read(i)), int(source.labels[i])
        except ImageError as error:
            return f"{source.name(i)}: {error}"

    try:
        return [read(i) for i in range(len(source))]
    finally:
        source.close()


@pytest.fixture(params=["shards", "bands", pytest.param("beton", marks=pytest.mark.ffcv)])
def converted(request: pytest.FixtureRequest, image_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """8 images in two shards, photographs or 12 channels of 16 bits; or in a .beton without them."""
    if request.param == "bands":
        source = folder_of(tmp_path / "in", [npy_of(image(i, 16, 20)) for i in range(8)], ending=".npy")
        for i, path in enumerate(sorted(source.iterdir())):
            (source / "train" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            path.rename(source / "train" / f"class{i % 2}" / path.name)
        convert(source, tmp_path / "out", ConvertSettings(RECORDS(short_side=0), images_per_shard=4))
        return tmp_path / "out" / "train"
    beton = BetonSettings(raw=0.5, alone=True) if request.param == "beton" else None
    settings = ConvertSettings(Reencode(short_side=0), images_per_shard=4)
    convert(image_folder(8), tmp_path / "out", settings, beton=beton)
    return tmp_path / "out" / "train"


def drill(folder: Path, injections: int, damage: Callable[[Path, np.random.Generator], None], seed: int) -> None:
    """Damage one file after the other: training must refuse it or read the same, --verify must find it."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    whole = read_all(folder)
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    refused = replaced = harmless = found = 0
    for _ in range(injections):
        path = list(files)[random.integers(len(files))]
        damage(path, random)
        try:
            got = read_all(folder)
        except DataError as error:
            assert path.name in str(error), f"{error} does not name {path.name}"  # noqa: PT017
            refused += 1
        else:
            bad = [i for i, image in enumerate(got) if image != whole[i]]
            assert all(isinstance(got[i], str) and path.name in got[i] for i in bad), [got[i] for i in bad]
            replaced, harmless = replaced + bool(bad), harmless + (not bad)
        try:
            found += bool(verify_shards(folder))
        except DataError:
            found += 1
        path.write_bytes(files[path])
    print(f"{injections} times: {refused} refused, {replaced} with records named, {harmless} that change no image")
    assert found == injections
    assert refused + replaced > injections // 4
    assert verify_shards(folder) == []


def test_every_flipped_bit_is_found(converted, times):
    def flip_one(path: Path, random: np.random.Generator) -> None:
        flip(path, int(random.integers(path.stat().st_size)), 1 << int(random.integers(8)))

    drill(converted, times(60, 1000), flip_one, seed=22)


def test_every_truncation_is_found(converted, times):
    def cut(path: Path, random: np.random.Generator) -> None:
        os.truncate(path, int(random.integers(path.stat().st_size)))

    drill(converted, times(16, 64), cut, seed=23)


def write(root: Path, *names: str) -> Path:
    root.mkdir()
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(i))
    return root


def labelled(root: Path, text: str) -> Path:
    (write(root, "a.jpg", "b.jpg") / "list.txt").write_text(text)
    return root / "list.txt"


REFUSED = {
    "empty": (lambda root: write(root), "no images in .* Point data_path at"),
    "missing": (lambda root: root / "nothing", r"does not exist: .* does, but holds no 'data'"),
    "less than a batch": (lambda root: write(root, "a/0.jpg", "b/1.jpg"), "Use a batch_size of 2 or less"),
    "some labels missing": (lambda root: labelled(root, "a.jpg 1\nb.jpg\n"), "line 2: either all lines have a label"),
    "list of nothing": (lambda root: labelled(root, "c.jpg 1\nd.jpg 2\n"), "do not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_of_odd_shape_is_refused_with_the_remedy(tmp_path, case):
    make, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        build(make(tmp_path / "data"), batch_size=4, input_size=32)


@pytest.mark.slow
def test_an_unreadable_folder_is_named(tmp_path):
    root = write(tmp_path / "data", "a/0.jpg")
    script = (
        "import sys; from spark_fast.pipelines import LoaderOptions, build_pipeline;"
        " build_pipeline(sys.argv[1], LoaderOptions(batch_size=1))"
    )
    place = Path(__file__).parents[2]
    tmp_path.chmod(0o755)
    (root / "a").chmod(0)
    command = [sys.executable, "-c", script, str(root)]
    if os.getuid() == 0:  # whom no permission stops
        os.chown(root / "a", 65534, 65534)
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    (root / "a").chmod(0o755)
    assert "DataError: cannot list the images of" in done.stderr
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("backend", "form"),
    [
        ("torch", "folder"),
        ("torch", "shards"),
        pytest.param("dali", "folder", marks=pytest.mark.dali),
        pytest.param("ffcv", "beton", marks=pytest.mark.ffcv),
    ],
)
@pytest.mark.parametrize("names", [["a/0.jpg"], ["0.jpg", "1.jpg", "2.jpg"]], ids=["one image", "flat"])
def test_one_image_and_a_flat_folder_train(tmp_path, backend, form, names):
    path = write(tmp_path / "data", *names)
    if form != "folder":
        beton = BetonSettings() if form == "beton" else None
        convert(path, tmp_path / "out", ConvertSettings(), beton=beton)
        path = tmp_path / "out" / (BETON if form == "beton" else "")
    (batch,) = batches(path, pipeline=backend, batch_size=len(names))
    assert sorted(batch.ids.tolist()) == list(range(len(names)))
    assert (batch.labels is None) == (len(names) > 1)
