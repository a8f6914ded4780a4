"""The drills of images, with 12 channels of 16 bits (faults 12 and 16 to 23)."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch

from spark_fast.errors import DataError, ImageError, StorageError
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert, convert_part
from spark_fast.pipelines.convert.conversion_parts import Part
from spark_fast.pipelines.convert.merge import merge
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.shard_format import MANIFEST, read_manifest
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from tests.faults.band_kinds import (
    CHANNELS,
    DAMAGED,
    KNOWN,
    READ_AS,
    RECORDS,
    VALID,
    bombs,
    folder_of,
    image,
    packed,
    shards_of,
)
from tests.faults.test_converter import (
    SHARDS,
    convert_here,
    convert_with_signal,
    killed,
    only_whole_files_count,
    small_disk,  # noqa: F401
    start,
)
from tests.faults.test_images import epochs, in_order, memory_taken_by_bombs
from tests.pipelines.bands import bands, dicom_of, npy_of, png_of
from tests.pipelines.building import build
from tests.pipelines.comparing import batches
from tests.pipelines.convert.test_conversion import contents
from tests.pipelines.damage import flip

every_store = pytest.mark.parametrize("store", [folder_of, shards_of], ids=["folder", "shards"])


def damaged_and_sound(repeats: int) -> tuple[list[bytes], list[str]]:
    """Each kind of damage, then the image that stands in for it; the kinds' names."""
    names = [*DAMAGED] * repeats
    sound = [image(seed) for seed in range(2 * len(names))]
    files = [packed(pixels) for pixels in sound]
    files[::2] = [DAMAGED[name](pixels) for name, pixels in zip(names, sound[::2], strict=True)]
    return files, names


@every_store
def test_a_damaged_image_is_replaced_counted_and_named_and_never_empty(tmp_path, times, caplog, store):
    files, names = damaged_and_sound(times(1, 5))
    path = store(tmp_path / "data", files)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        (first, second), counts = epochs(path, "torch", len(files), **READ_AS)
    assert (counts.read, counts.substituted, len(counts.first_substituted)) == (2 * len(files), 2 * len(names), 10)
    for i in range(0, len(files), 2):
        assert sum(f"image {i} (" in record.getMessage() for record in caplog.records) == 1  # once in two epochs
    shown = in_order(first)
    assert torch.equal(shown[::2], shown[1::2])  # the next readable one stands in
    assert torch.equal(shown, in_order(second))
    assert shown.std((2, 3)).min() > 0.01


def test_conversion_leaves_damaged_images_out_and_lists_them_with_reasons(tmp_path, times):
    files, names = damaged_and_sound(times(1, 5))
    ((folder, manifest),) = convert(
        folder_of(tmp_path / "in", files), tmp_path / "out", ConvertSettings(RECORDS(short_side=0))
    )
    assert manifest.count == len(files) - len(names)
    assert [entry["name"] for entry in manifest.refused] == [f"{i:04d}.tif" for i in range(0, len(files), 2)]
    assert all(entry["reason"] for entry in manifest.refused)
    assert verify_shards(folder) == []


def test_odd_but_valid_files_hold_the_same_numbers_in_a_folder_and_in_shards(tmp_path):
    pixels, root = image(0, 32, 32), tmp_path / "odd"
    root.mkdir()
    for name, write in VALID.items():
        (root / f"{name} \u00e9.tif").write_bytes(write(pixels))
    ((shards, manifest),) = convert(root, tmp_path / "out", ConvertSettings(RECORDS()))
    assert manifest.refused == []
    for path in (root, shards):
        (batch, _), counts = epochs(path, "torch", len(VALID), input_size=32, max_bad_fraction=0.0, **READ_AS)
        assert counts.substituted == 0
        for shown in batch.images * torch.tensor(KNOWN.std)[:, None, None] + torch.tensor(KNOWN.mean)[:, None, None]:
            np.testing.assert_allclose(shown.permute(1, 2, 0) * 65535, pixels, atol=0.02)
    odd = [image(0, 1, 1), image(1, 1, 400), image(2, 400, 1)]
    (batch, _), counts = epochs(folder_of(tmp_path / "thin", [*map(npy_of, odd)]), "torch", len(odd), **READ_AS)
    assert counts.substituted == 0
    assert batch.images.isfinite().all()


@pytest.mark.slow
def test_bombs_are_refused_without_unpacking_them(tmp_path, times):
    hostile = bombs(large=times(False, True))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.tif").write_bytes(hostile["sound"])
    (tmp_path / "bombs").mkdir()
    for name, data in hostile.items():
        (tmp_path / "bombs" / f"{name}.tif").write_bytes(data)
    replaced, mib = memory_taken_by_bombs(tmp_path, "torch", CHANNELS)
    assert replaced == len(hostile) - 1
    assert mib < 128
    refused = {entry["name"] for entry in read_manifest(tmp_path / "out" / "bombs").refused}
    assert refused == {f"{name}.tif" for name in hostile if name != "sound"}


def test_files_with_random_damage_are_read_whole_or_refused(times):
    """Whatever a bit or a piece that is missing makes of a file, nothing but an ImageError comes of it."""
    seed = 18
    print(f"seed {seed}")
    random, taken, refused = np.random.default_rng(seed), 0, 0
    grey = bands(1, 20, 30, 1)
    files = [(write(image(0, 20, 30)), CHANNELS) for write in VALID.values()]
    files += [(png_of(grey), 1), (dicom_of(grey[:, :, 0]), 1), (png_of(bands(2, 20, 30, 4)), 4)]
    for data, channels in files:
        for _ in range(times(12, 400)):
            hurt = bytearray(data)
            hurt[random.integers(len(hurt))] ^= 1 << random.integers(8)
            if random.integers(3) == 0:
                del hurt[random.integers(len(hurt)) :]
            try:
                pixels = decode_bands(bytes(hurt), Expected(channels, max_pixels=10_000)).pixels
            except ImageError:
                refused += 1
            else:
                taken += 1
                assert pixels.shape[2] == channels
    print(f"{taken} taken, {refused} refused")
    assert taken
    assert refused


@pytest.mark.slow
def test_too_many_bad_images_end_the_epoch_with_their_count_and_names(tmp_path):
    files = [b"broken" if i % 8 == 3 else npy_of(image(i, 8, 8)) for i in range(100)]
    path = folder_of(tmp_path / "data", files)
    pipeline = build(path, batch_size=100, input_size=8, max_bad_fraction=0.12, **READ_AS)
    for epoch in range(9):  # not judged before 1,000 images
        list(pipeline.epoch(epoch))
    with pytest.raises(DataError, match=r"130 of 1000 images .* max_bad_fraction = 0.12") as caught:
        list(pipeline.epoch(9))
    pipeline.close()
    assert all(int(line.split()[0]) % 8 == 3 for line in str(caught.value).splitlines()[1:])


def test_data_of_odd_shape_trains_or_is_refused_with_the_remedy(tmp_path):
    one = folder_of(tmp_path / "one", [npy_of(image(0))])
    convert(one, tmp_path / "shards", ConvertSettings(RECORDS()))
    for path in (one, tmp_path / "shards"):
        (batch,) = batches(path, batch_size=1, in_chans=CHANNELS)
        assert batch.images.shape == (1, CHANNELS, 32, 32)
        with pytest.raises(DataError, match="Use a batch_size of 1 or less"):
            build(path, batch_size=4, **READ_AS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file ending in .*\.npy.* Point data_path at"):
        build(tmp_path / "empty", batch_size=4, **READ_AS)


def test_storage_that_stumbles_is_asked_again_and_what_is_lost_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("spark_fast.pipelines.sources.source.RETRY_SECONDS", (0.001, 0.002))
    path = folder_of(tmp_path / "data", [npy_of(image(i, 8, 8)) for i in range(20)])
    pipeline = build(path, batch_size=20, input_size=8, max_bad_fraction=0.5, **READ_AS)
    read, asked = pipeline._source.read, []  # type: ignore[attr-defined]

    def stumbling(i: int) -> bytes:
        asked.append(i)
        if i == 3 and asked.count(3) < 3:
            raise OSError(5, "Input/output error")
        return read(i)

    pipeline._source.read = stumbling  # type: ignore[attr-defined]
    (path / "0007.tif").unlink()
    list(pipeline.epoch(0))
    pipeline.close()
    assert (asked.count(3), asked.count(7)) == (3, 3)
    (named,) = pipeline.bad_images.first_substituted
    assert named.startswith("7 0007.tif: ")


def test_a_record_that_changes_under_the_loader_is_replaced_and_named(tmp_path):
    convert(
        folder_of(tmp_path / "in", [npy_of(image(i)) for i in range(8)]),
        tmp_path / "out",
        ConvertSettings(RECORDS(), images_per_shard=4),
    )
    pipeline = build(tmp_path / "out", batch_size=8, input_size=32, augment=False, max_bad_fraction=1.0, **READ_AS)
    (before,) = pipeline.epoch(0)
    source = pipeline._source  # type: ignore[attr-defined]
    row, shards = source._index[5], source._index["shard"]
    shard = tmp_path / "out" / f"shard-{int(row['shard']):06d}.tar"
    flip(shard, int(row["offset"]) + int(row["size"]) - 1)
    (after,) = pipeline.epoch(1)
    (named,) = pipeline.bad_images.first_substituted
    assert named.startswith("5 ")
    assert "checksum differs, the shard is damaged" in named
    changed = (in_order(before) != in_order(after)).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [5]
    os.truncate(shard, 600)  # within the first of its four records
    list(pipeline.epoch(2))
    pipeline.close()
    cut = [line for line in pipeline.bad_images.first_substituted if "was truncated while in use" in line]
    assert sorted(int(line.split()[0]) for line in cut) == sorted(set(np.flatnonzero(shards == row["shard"])) - {5})


def test_a_part_that_was_stopped_goes_on_and_merges_to_the_bytes_of_one_machine(tmp_path):
    src, made = (
        folder_of(tmp_path / "in", [npy_of(image(i)) for i in range(8)]),
        ConvertSettings(RECORDS(short_side=32), images_per_shard=2),
    )
    convert(src, tmp_path / "whole", made)
    convert_part(src, tmp_path / "out", made, Part(2, 2))

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_part(src, tmp_path / "out", made, Part(1, 2), on_progress=stop)
    with pytest.raises(DataError, match="part 1/2 is missing"):
        merge(tmp_path / "out")
    convert_part(src, tmp_path / "out", made, Part(1, 2))
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_conversion_is_started_again_and_ends_with_the_same_bytes(tmp_path, times):
    seed = 21
    print(f"seed {seed}")
    random, dst = np.random.default_rng(seed), tmp_path / "out"
    src = folder_of(tmp_path / "in", [packed(image(i, 200, 240)) for i in range(4 * SHARDS)])
    made = ConvertSettings(RECORDS(short_side=128), images_per_shard=4)
    convert_here(src, tmp_path / "whole", "shards", made)
    kills = landed = 0
    while landed < times(1, 10):
        kills += 1
        assert kills < 100
        process = start(src, dst, "shards", made, "--in_chans", str(CHANNELS))
        if killed(process, dst, random.uniform(0, SHARDS)):
            landed += 1
            only_whole_files_count(dst)
        else:
            assert contents(dst) == contents(tmp_path / "whole")
            shutil.rmtree(dst)
    convert_here(src, dst, "shards", made)
    assert contents(dst) == contents(tmp_path / "whole")
    shard = dst / "shard-000003.tar"
    flip(shard, shard.stat().st_size // 2)
    assert any(shard.name in fault for fault in verify_shards(dst))


@pytest.mark.slow
def test_a_full_disk_leaves_whole_shards_and_with_room_it_goes_on(tmp_path, small_disk):  # noqa: F811
    src, dst = folder_of(tmp_path / "in", [packed(image(i, 60, 80)) for i in range(24)]), small_disk("1m")
    made = ConvertSettings(RECORDS(short_side=0), images_per_shard=2)  # of 230 kB
    process = start(src, dst, "shards", made, "--in_chans", str(CHANNELS))
    said, _ = process.communicate()
    assert process.returncode == 6, said
    assert "the disk is full. Finished shards are kept: free some space and run the same command again" in said
    left = [path.name for path in dst.iterdir()]
    assert any(name.endswith(".tar") for name in left)
    assert MANIFEST not in left
    small_disk("64m")
    convert_here(src, dst, "shards", made)


@pytest.mark.drill
@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_the_same_call_goes_on(tmp_path):
    src = folder_of(tmp_path / "in", [packed(image(i)) for i in range(24)])
    made = ConvertSettings(RECORDS(), images_per_shard=5)
    convert(src, tmp_path / "whole", made)
    with pytest.raises(StorageError, match="a worker process died"):
        convert_with_signal(src, tmp_path / "out", made, signal.SIGKILL, 1)
    convert(src, tmp_path / "out", made)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_thread_that_fails_or_would_wait_for_ever_is_told_with_the_image(tmp_path):
    path = folder_of(tmp_path / "data", [npy_of(image(i)) for i in range(6)])
    (path / "0002.tif").unlink()
    os.mkfifo(path / "0002.tif")
    pipeline = build(path, batch_size=6, input_size=32, max_bad_fraction=1.0, **READ_AS)
    list(pipeline.epoch(0))
    (named,) = pipeline.bad_images.first_substituted
    assert "not a regular file" in named
    read: Callable[[int], bytes] = pipeline._source.read  # type: ignore[attr-defined]
    pipeline._source.read = lambda i: read(i) if i != 4 else 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"while loading image 4 \(0004.tif\): ZeroDivisionError"):
        list(pipeline.epoch(1))
    pipeline.close()
