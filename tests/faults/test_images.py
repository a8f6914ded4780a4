"""Damaged, odd and hostile images, in every backend and every form of storage (faults 16 to 19)."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.errors import DataError
from spark_fast.pipelines import BadImageCounts, Batch
from spark_fast.pipelines.convert.beton_writer import BetonSettings
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.beton import BetonSource, checks_path, sealed_checks
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import BETON, read_manifest
from spark_fast.pipelines.transforms.crops import DRAWS, Augmentation
from tests.cli.tiny_run import TINY, here
from tests.faults.kinds import DAMAGED, VALID, bombs
from tests.faults.stored import folder_of, shards_of
from tests.pipelines.building import build
from tests.pipelines.comparing import pixels
from tests.pipelines.pictures import jpeg

STORES = [
    pytest.param("torch", "folder"),
    pytest.param("torch", "shards"),
    pytest.param("torch", "beton", marks=pytest.mark.ffcv),
    pytest.param("dali", "folder", marks=pytest.mark.dali),
    pytest.param("dali", "shards", marks=pytest.mark.dali),
    pytest.param("ffcv", "beton", marks=pytest.mark.ffcv),
]
every_backend = pytest.mark.parametrize(("backend", "store"), STORES)
KEEP = ConvertSettings(Reencode(short_side=0, quality=95))


def beton_of(root: Path, images: list[bytes], sound: list[bytes]) -> Path:
    """A .beton of sound images whose records are then overwritten with these bytes, under right checksums."""
    convert(folder_of(root.with_name(root.name + " sound"), sound), root, KEEP, beton=BetonSettings(alone=True))
    source = BetonSource(root / BETON)
    checks = source.checks.copy()
    source.close()
    with (root / BETON).open("r+b") as file:
        for row, data in zip(checks, images, strict=True):
            size = int(row["size"])
            file.seek(int(row["ptr"]))
            file.write(data[:size].ljust(size, b"\0"))
            row["crc"] = zlib.crc32(data[:size].ljust(size, b"\0"))
        file.flush()
        checks_path(root / BETON).write_bytes(sealed_checks(checks, file))
    return root / BETON


def stored(kind: str, root: Path, images: list[bytes], sound: list[bytes]) -> Path:
    if kind == "beton":
        return beton_of(root, images, sound)
    return (folder_of if kind == "folder" else shards_of)(root, images)


def epochs(path: Path, backend: str, count: int, **settings: object) -> tuple[list[Batch], BadImageCounts]:
    settings = {"input_size": 48, "augment": False, "max_bad_fraction": 1.0} | settings
    pipeline = build(path, pipeline=backend, batch_size=count, **settings)  # type: ignore[arg-type]
    try:
        return [batch for epoch in range(2) for batch in pipeline.epoch(epoch)], pipeline.bad_images
    finally:
        pipeline.close()


def in_order(batch: Batch) -> torch.Tensor:
    return batch.images[batch.ids.argsort()]


def damaged_and_sound(repeats: int) -> tuple[list[bytes], list[bytes], list[str]]:
    """Each kind of damage, then the picture that stands in for it; the same all sound; the kinds' names."""
    sound = [jpeg(seed, 50 + seed % 7, 70 + seed % 11) for seed in range(2 * repeats * len(DAMAGED))]
    names = [*DAMAGED] * repeats
    images = list(sound)
    images[::2] = [DAMAGED[name](data) for name, data in zip(names, sound[::2], strict=True)]
    return images, sound, names


@every_backend
def test_a_damaged_image_is_replaced_counted_and_named_and_never_black(tmp_path, times, caplog, backend, store):
    images, sound, names = damaged_and_sound(times(1, 5))
    path = stored(store, tmp_path / "data", images, sound)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        (first, second), counts = epochs(path, backend, len(images))
    assert (counts.read, counts.substituted, len(counts.first_substituted)) == (2 * len(images), 2 * len(names), 10)
    for i in range(0, len(images), 2):
        assert sum(f"image {i} (" in record.getMessage() for record in caplog.records) == 1  # once in two epochs
    shown = in_order(first)
    apart = np.abs(pixels(shown[::2]) - pixels(shown[1::2])).mean((1, 2, 3)).max()
    assert apart < 2 if backend == "ffcv" else apart == 0  # the next readable one stands in; FFCV's DCT is rougher
    assert torch.equal(shown, in_order(second))
    assert pixels(shown).std((1, 2, 3)).min() > 10  # neither black nor grey
    if backend != "torch":
        assert counts == epochs(path, "torch", len(images))[1]  # the same names and reasons


@pytest.mark.parametrize("form", ["shards", pytest.param("beton", marks=pytest.mark.ffcv)])
def test_conversion_leaves_damaged_images_out_and_lists_them_with_reasons(tmp_path, times, form):
    images, _, names = damaged_and_sound(times(1, 5))
    root = folder_of(tmp_path / "in", images)
    beton = BetonSettings() if form == "beton" else None
    ((folder, manifest),) = convert(root, tmp_path / "out", KEEP, workers=2, beton=beton)
    assert manifest == read_manifest(folder)
    assert manifest.count == len(images) - len(names)
    assert [entry["name"] for entry in manifest.refused] == [f"{i:04d}.JPEG" for i in range(0, len(images), 2)]
    assert all(entry["reason"] for entry in manifest.refused)
    assert verify_shards(folder) == []


def expected(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """What Pillow shows of an image, (H, W, 3), in the central crop of all backends."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    box = Augmentation(size, random=False).box([0.0] * DRAWS, image.height, image.width)
    image = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=float)


@every_backend
def test_odd_but_valid_images_show_what_pillow_shows(tmp_path, backend, store):
    root = tmp_path / "odd"
    root.mkdir()
    for name, data in VALID.items():
        (root / f"{name.replace(':', '')}.JPEG").write_bytes(data)
    path = root
    if store != "folder":
        ((path, manifest),) = convert(root, tmp_path / "out", KEEP, beton=BetonSettings() if store == "beton" else None)
        assert manifest.refused == []
        path = path / BETON if store == "beton" else path
    (batch, _), counts = epochs(path, backend, len(VALID), max_bad_fraction=0.0)
    assert counts.substituted == 0
    source = detect_source(path)
    different = {
        source.name(i): np.abs(shown - expected(bytes(source.read(i)), (48, 48))).mean()
        for i, shown in enumerate(pixels(in_order(batch)))
    }
    source.close()
    assert len(different) == len(VALID)
    assert len(different) >= 20
    print(f"{backend} over {store}: {max(different.values()):.2f}/255 at most")
    assert max(different.values()) < 2, {name: value for name, value in different.items() if value >= 2}


MEASURE = """
import sys
from pathlib import Path
from spark_fast.operating_system import peak_resident_bytes
from spark_fast.pipelines import LoaderOptions, build_pipeline
from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
small, bombs, out, backend, channels = sys.argv[1:]
channels = int(channels)

def read(path):
    settings = dict(batch_size=len(list(Path(path).iterdir())), input_size=32, max_bad_fraction=1.0, in_chans=channels)
    pipeline = build_pipeline(path, LoaderOptions(pipeline=backend, workers=1, prefetch=1, **settings))
    list(pipeline.epoch(0))
    pipeline.close()
    stored = ConvertSettings() if channels == 3 else ConvertSettings(BandRecords(in_chans=channels))
    convert(Path(path), Path(out) / Path(path).name, stored)
    return pipeline.bad_images.substituted, peak_resident_bytes()

_, before = read(small)
replaced, after = read(bombs)
print(replaced, (after - before) >> 20)
"""


def memory_taken_by_bombs(root: Path, backend: str, in_chans: int = 3) -> tuple[int, int]:
    """Read and convert the folders `small` and `bombs`: how many were replaced, and MiB beyond those for `small`."""
    words = [str(root / name) for name in ("small", "bombs", "out")] + [backend, str(in_chans)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    replaced, mib = map(int, done.stdout.split())
    print(f"{backend}: {mib} MiB above what one small image takes")
    return replaced, mib


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", pytest.param("dali", marks=pytest.mark.dali)])
def test_bombs_are_refused_without_unpacking_them(tmp_path, times, backend):
    for folder in ("small", "bombs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "small" / "a.jpg").write_bytes(jpeg(0))
    hostile = bombs(large=times(False, True))
    for name, data in hostile.items():
        (tmp_path / "bombs" / f"{name}.JPEG").write_bytes(data)
    replaced, mib = memory_taken_by_bombs(tmp_path, backend)
    assert replaced == sum(name.startswith("bomb") for name in hostile)
    assert mib < 1024
    refused = {entry["name"] for entry in read_manifest(tmp_path / "out" / "bombs").refused}
    assert refused == {f"{name}.JPEG" for name in hostile if name.startswith("bomb")}


@every_backend
def test_too_many_bad_images_end_the_epoch_with_their_count_and_names(tmp_path, backend, store):
    sound = [jpeg(i, 20, 20) for i in range(100)]
    images = [b"broken" if i % 8 == 3 else data for i, data in enumerate(sound)]
    path = stored(store, tmp_path / "data", images, sound)
    pipeline = build(path, pipeline=backend, batch_size=100, input_size=32, max_bad_fraction=0.12)
    for epoch in range(9):  # not judged before 1,000 images
        list(pipeline.epoch(epoch))
    with pytest.raises(DataError, match=r"130 of 1000 images .* max_bad_fraction = 0.12") as caught:
        list(pipeline.epoch(9))
    pipeline.close()
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 10
    assert all(int(line.split()[0]) % 8 == 3 for line in lines)
    tolerant = build(path, pipeline=backend, batch_size=100, input_size=32, max_bad_fraction=0.13)
    assert sum(len(batch.ids) for epoch in range(10) for batch in tolerant.epoch(epoch)) == 1000
    assert tolerant.bad_images.substituted == 130
    tolerant.close()


@pytest.mark.slow
def test_the_trainer_then_ends_with_exit_code_3(tmp_path):
    root = folder_of(tmp_path / "data", [b"broken" if i % 8 == 3 else jpeg(i, 20, 20) for i in range(100)])
    flags = [f"--data_path={root}", *TINY, "--model=test_resnet", "--bs=100", "--ep=12", "--picture_every=0"]
    assert "130 of 1000 images" in here("name", *flags, f"--exp_dir={tmp_path / 'run'}", code=3).stderr
