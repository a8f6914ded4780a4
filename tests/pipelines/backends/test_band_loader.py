"""Images of any channels and numbers, from their files to batches: what NumPy and tifffile read, by the same boxes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines import Batch, LoaderOptions
from spark_fast.pipelines.backends.band_loader import BandLoader
from spark_fast.pipelines.build import measure_statistics
from spark_fast.pipelines.sampler import uniform
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS
from spark_fast.pipelines.transforms.bands.band_augment import BandAugment
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise, scaled
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.pipelines.transforms.crops import ALL_DRAWS, DRAWS, Augmentation, Box, Turn
from tests.pipelines.bands import SETS, bands, dicom_of, npy_of, npz_of, png_of, tiff_of
from tests.pipelines.building import build
from tests.pipelines.pictures import jpeg

every_set = pytest.mark.parametrize("kind", SETS)
SEED = 5


def images_of(kind: str, count: int = 12, height: int = 50, width: int = 60) -> list[np.ndarray]:
    channels, dtype, _, _ = SETS[kind]
    return [bands(i, height, width, channels, dtype) for i in range(count)]


def folder_of(root: Path, kind: str, **shape: int) -> Path:
    """Class folders of a set."""
    for i, pixels in enumerate(images_of(kind, **shape)):
        _, _, ending, encode = SETS[kind]
        path = root / f"class{i % 3}" / f"{i:03d}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    return root


def batches(root: Path, kind: str, epoch: int = 0, start_step: int = 0, **options: object) -> list[Batch]:
    asked = {"batch_size": 4, "input_size": 32, "seed": SEED, "in_chans": SETS[kind][0], "workers": 2}
    pipeline = build(root, **{**asked, "worker_processes": 0, **options})
    try:
        return list(pipeline.epoch(epoch, start_step))
    finally:
        pipeline.close()


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) for a, b in zip(some, others, strict=True)
    )


def statistics_of(root: Path, kind: str, **options: object) -> Statistics:
    found = measure_statistics(root, LoaderOptions(4, in_chans=SETS[kind][0], **options))  # type: ignore[arg-type]
    assert found is not None
    return found


def in_order(root: Path) -> list[int]:
    """The number in each file's name, by the source's own numbers."""
    source = detect_source(root, endings=BAND_EXTENSIONS)
    return [int(Path(source.name(i)).stem) for i in range(len(source))]


@every_set
def test_pixels_are_those_of_the_files_bit_by_bit_where_nothing_is_resized(tmp_path, kind):
    root = folder_of(tmp_path / "set", kind, height=32, width=32)
    channels = SETS[kind][0]
    identity = Statistics(
        "none", SETS[kind][1], (0.0,) * channels, (1.0,) * channels, (0.0,) * channels, (1.0,) * channels
    )
    stored, numbers = images_of(kind, height=32, width=32), in_order(root)
    for place in ("host", "device"):
        whole = batches(root, kind, augment=False, statistics=identity, augment_on=place, batch_size=12)[0]
        for image, i in zip(whole.images, whole.ids.tolist(), strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[numbers[i]].astype(np.float32))


def reference(pixels: np.ndarray, draws: list[float], augmentation: Augmentation, known: Statistics) -> np.ndarray:
    """torch's own resize of the crop, and NumPy's turns and arithmetic, in float64: (C, H, W)."""
    box, mirrored = augmentation.box(draws, *pixels.shape[:2]), augmentation.flips(draws)
    crop = pixels[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float64)
    crop = np.rot90(crop, int(4 * draws[DRAWS + 1])) if augmentation.rot90 else crop
    planes = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None]
    resized = interpolate(planes, size=augmentation.input_size, mode="bicubic", antialias=True)[0].numpy()
    resized = resized[:, :, ::-1] if mirrored else resized
    resized = resized[:, ::-1] if augmentation.vflip and draws[DRAWS] < 0.5 else resized
    if pixels.dtype.kind in "ui":
        resized = resized.clip(np.iinfo(pixels.dtype).min, np.iinfo(pixels.dtype).max)
    in_range = scaled(resized.transpose(1, 2, 0), known)
    return ((in_range - known.mean) / known.std).transpose(2, 0, 1)


@every_set
@pytest.mark.parametrize("scale", ["auto", "percentile", "none"])
@pytest.mark.parametrize("turned", [False, True])
def test_crops_are_torchs_antialiased_resize_in_floating_point(tmp_path, kind, scale, turned):
    root = folder_of(tmp_path / "set", kind)
    known = statistics_of(root, kind, scaling=scale)
    stored, numbers = images_of(kind), in_order(root)
    augmentation = Augmentation((32, 40), vflip=turned, rot90=turned)
    asked = {"input_size": (32, 40), "scaling": scale, "vflip": turned, "rot90": turned, "batch_size": 12}
    (on_host,) = batches(root, kind, epoch=3, **asked)
    (on_device,) = batches(root, kind, epoch=3, augment_on="device", **asked)
    assert torch.equal(on_host.ids, on_device.ids)
    seen = set()
    for host, device, i in zip(on_host.images, on_device.images, on_host.ids.tolist(), strict=True):
        (draws,) = uniform(SEED, 3, [i], ALL_DRAWS).tolist()
        expected = reference(stored[numbers[i]], draws, augmentation, known)
        np.testing.assert_allclose(host.numpy(), expected, atol=2e-4)
        np.testing.assert_allclose(device.numpy(), expected, atol=2e-3)
        seen.add(augmentation.turn(draws))
    assert len(seen) >= (4 if turned else 2)


@every_set
def test_workers_ranks_and_a_resume_change_nothing(tmp_path, kind):
    root = folder_of(tmp_path / "set", kind)
    turns = {"vflip": True, "rot90": True}
    whole = batches(root, kind, epoch=1, **turns)
    assert len(whole) == 3
    assert whole[0].images.shape == (4, SETS[kind][0], 32, 32)
    assert whole[0].images.is_contiguous(memory_format=torch.channels_last)
    assert same(batches(root, kind, epoch=1, workers=4, worker_processes=0, prefetch=5, **turns), whole)
    assert same(batches(root, kind, epoch=1, start_step=2, **turns), whole[2:])
    ranks = [batches(root, kind, epoch=1, rank=rank, world_size=2, **turns) for rank in range(2)]
    both = [
        Batch(torch.cat([a.images, b.images]), None, torch.cat([a.ids, b.ids])) for a, b in zip(*ranks, strict=True)
    ]
    assert same(both, whole)
    assert not same(batches(root, kind, epoch=2, **turns), whole)


@every_set
def test_files_that_python_libraries_read_have_processes_from_two_threads_on(tmp_path, kind, monkeypatch, caplog):
    monkeypatch.setattr("spark_fast.pipelines.backends.torch_pipeline.usable_cores", lambda: 2)
    ending, root = SETS[kind][2], folder_of(tmp_path, kind)
    with caplog.at_level("INFO"):
        build(root, batch_size=4, input_size=32, in_chans=SETS[kind][0], workers=2).close()
    place = "2 worker processes" if ending in (".tif", ".dcm") else "this process"
    assert f"2 threads decode, in {place}" in caplog.text


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_what_was_in_the_memory_beside_a_crop_is_not_seen(garbage):
    known = Statistics("none", "float32", (0.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0))
    normalise = BandNormalise(known, 8, torch.device("cpu"), torch.float32)
    augment = BandAugment((8, 8), torch.device("cpu"), torch.float32, normalise)
    images = []
    for value in (garbage, 0.0):
        cells = torch.full((1, *augment.cell, 2), value)
        crop = augment.put(bands(1, 12, 10, 2, "float32"), Box(0, 0, 12, 10), 0, cells[0])
        images.append(augment(cells, torch.tensor([crop])))
    assert images[0].isfinite().all()
    assert torch.equal(*images)


def test_every_turn_is_drawn_and_the_draws_of_crops_and_flips_stay_where_they_were():
    every, plain = Augmentation(vflip=True, rot90=True), Augmentation()
    rows = uniform(1, 0, range(400), ALL_DRAWS)
    assert np.array_equal(rows[:, :DRAWS], uniform(1, 0, range(400), DRAWS))
    turns = [every.turn(row) for row in rows.tolist()]
    counts = np.bincount(turns, minlength=8)
    assert counts.min() > 25  # of 50, of each of the eight
    assert [plain.turn(row) for row in rows.tolist()] == [plain.flips(row) for row in rows.tolist()]
    assert {Augmentation(vflip=True, flip=False).turn(row) for row in rows.tolist()} == {0, Turn.UPSIDE_DOWN}
    assert Augmentation(vflip=True, rot90=True, random=False).turn([0.0] * ALL_DRAWS) == 0


def test_photographs_are_turned_too_and_only_where_it_is_asked(image_folder):
    root = image_folder(8)
    plain, turned = (
        build(root, batch_size=8, input_size=32, seed=SEED, scale=(1.0, 1.0), ratio=(1.0, 1.0), **turns)
        for turns in ({"flip": False}, {"flip": False, "vflip": True, "rot90": True})
    )
    (before,), (after,) = list(plain.epoch(0)), list(turned.epoch(0))
    for image, other, i in zip(before.images, after.images, before.ids.tolist(), strict=True):
        (draws,) = uniform(SEED, 0, [i], ALL_DRAWS).tolist()
        expected = np.rot90(image.numpy(), int(4 * draws[DRAWS + 1]), axes=(1, 2))
        expected = expected[:, ::-1] if draws[DRAWS] < 0.5 else expected
        np.testing.assert_allclose(other.numpy(), expected, atol=0.05)  # of 2.6; bytes are rounded
    for pipeline in (plain, turned):
        pipeline.close()


@every_set
def test_a_batch_for_the_bus_holds_the_numbers_of_the_files(tmp_path, kind):
    root = folder_of(tmp_path / "set", kind)
    channels, dtype, _, _ = SETS[kind]
    source, known = detect_source(root, endings=BAND_EXTENSIONS), statistics_of(root, kind)
    loader = BandLoader(
        source, Augmentation((32, 32)), expected=LoaderOptions(4, in_chans=channels).expected, statistics=known
    )
    out = torch.zeros(32, 32, channels, dtype=getattr(torch, dtype))
    loader.load(3, [0.3] * ALL_DRAWS, out)
    exact = reference(images_of(kind)[in_order(root)[3]], [0.3] * ALL_DRAWS, Augmentation((32, 32)), known).transpose(
        1, 2, 0
    )
    found = (scaled(out.numpy(), known) - known.mean) / known.std
    step = 0 if dtype == "float32" else 0.5 / np.iinfo(dtype).max / min(known.std)
    np.testing.assert_allclose(found, exact, atol=step + 2e-4)


FAULTS = {
    "a TIFF that is cut short": lambda pixels: tiff_of(pixels, planarconfig="contig", compression="zlib")[:-700],
    "zero bytes": lambda pixels: b"",
    "one channel less": lambda pixels: tiff_of(pixels[:, :, :-1], planarconfig="contig"),
    "NaN": lambda pixels: npy_of(np.where(pixels == pixels.max(), np.nan, pixels).astype(np.float32)),
    "a photograph": lambda pixels: jpeg(1),
}


def test_bad_images_of_12_x_16_bits_are_replaced_counted_and_named(tmp_path, caplog):
    root, names = folder_of(tmp_path / "set", "12 x 16 bit", count=20), list(FAULTS)
    bad = [2 * k for k in range(len(names))]
    source = detect_source(root, endings=BAND_EXTENSIONS)
    for sample, name in zip(bad, names, strict=True):
        path = root / source.name(sample)
        path.write_bytes(FAULTS[name](images_of("12 x 16 bit")[0]))
    known = replace(statistics_of(root, "12 x 16 bit"), dtype="uint16")
    asked = {"batch_size": 20, "in_chans": 12, "input_size": 32, "augment": False, "max_bad_fraction": 1.0}
    pipeline = build(root, statistics=known, **asked)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        (first,), (second,) = (list(pipeline.epoch(epoch)) for epoch in range(2))
    pipeline.close()
    counts = pipeline.bad_images
    assert (counts.read, counts.substituted) == (40, 2 * len(bad))
    assert sorted(int(line.split()[0]) for line in counts.first_substituted) == bad
    for sample in bad:
        assert sum(f"image {sample} (" in message for message in caplog.messages) == 1
    for said in ("cut short", "zero bytes", "it has 11 channels where --in_chans is 12", "NaN or infinite",
                 "it has 3 channels where"):  # fmt: skip
        assert any(said in message for message in caplog.messages), said
    shown = first.images[first.ids.argsort()]
    assert torch.equal(shown, second.images[second.ids.argsort()])
    for sample in bad:
        assert torch.equal(shown[sample], shown[sample + 1])  # the next readable one stands in


def test_numbers_that_the_measured_images_did_not_have_are_bad_images_on_the_way_to_a_device(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.npy").write_bytes(npy_of(bands(i, 20, 20, 2, "uint16" if i == 2 else "uint8")))
    known = Statistics("dtype", "uint8", (0.5,) * 2, (0.2,) * 2, (0.0,) * 2, (255.0,) * 2)
    pipeline = build(tmp_path, batch_size=4, in_chans=2, input_size=16, statistics=known, max_bad_fraction=1.0)
    list(pipeline.epoch(0))
    pipeline.close()
    (named,) = pipeline.bad_images.first_substituted
    assert named.startswith("2 2.npy: its numbers are uint16, those of the images measured at the start uint8")


def test_files_of_every_kind_go_into_one_batch(tmp_path):
    grey = [bands(i, 30, 30, 1, "uint16") for i in range(6)]
    files = {
        "a.png": png_of(grey[0]), "b.tif": tiff_of(grey[1][:, :, 0]), "c.npy": npy_of(grey[2]),
        "d.npz": npz_of(x=grey[3]), "e.dcm": dicom_of(grey[4][:, :, 0]), "f.npy": npy_of(grey[5] // 256),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "notes.txt").write_text("no image")
    pipeline = build(tmp_path, batch_size=6, in_chans=1, scaling="none", input_size=30, augment=False)
    (batch,) = list(pipeline.epoch(0))
    assert pipeline.statistics is not None
    assert pipeline.statistics.dtype == "float32"  # DICOM's, rescaled
    images = batch.images[batch.ids.argsort()].double() * pipeline.statistics.std[0] + pipeline.statistics.mean[0]
    pipeline.close()
    grey[5] = grey[5] // 256
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), np.stack(grey), rtol=1e-5, atol=0.05)


def test_a_list_names_arrays_too(tmp_path):
    for i in range(3):
        (tmp_path / f"scan {i}.npy").write_bytes(npy_of(bands(i, 20, 20, 2)))
    (tmp_path / "list.csv").write_text("scan 0.npy,7\nscan 1.npy,8\nscan 2.npy,9\n")
    pipeline = build(tmp_path / "list.csv", batch_size=3, in_chans=2, input_size=16)
    (batch,) = list(pipeline.epoch(0))
    assert sorted(batch.labels.tolist()) == [7, 8, 9]  # type: ignore[union-attr]
    pipeline.close()


def test_without_channels_arrays_are_no_images_and_splits_hold_only_what_is_read(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(4):
            (tmp_path / split / f"{i}.npy").write_bytes(npy_of(bands(i, 20, 20, 2)))
    pipeline = build(tmp_path, batch_size=4, in_chans=2, input_size=16)
    assert pipeline.num_samples == 4
    pipeline.close()
    with pytest.raises(DataError, match=r"Left out: 4 files by extension: .npy"):
        build(tmp_path, batch_size=4, input_size=16)


@pytest.mark.parametrize("pipeline", ["dali", "ffcv"])
def test_other_pipelines_refuse_what_they_cannot_read(tmp_path, pipeline):
    with pytest.raises(
        SettingsError, match=f"pipeline {pipeline} reads only photographs, .* use pipeline torch for --in_chans 5"
    ):
        build(tmp_path, pipeline=pipeline, batch_size=4, in_chans=5)
    for turn in ("vflip", "rot90"):
        with pytest.raises(SettingsError, match=f"pipeline {pipeline} supports neither --vflip nor --rot90"):
            build(tmp_path, pipeline=pipeline, batch_size=4, **{turn: True})
    with pytest.raises(SettingsError, match="decoding on the device reads only photographs"):
        build(tmp_path, batch_size=4, in_chans=1, decode_on="device")
