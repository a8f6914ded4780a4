from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from spark_fast.errors import DataError, ImageError, SettingsError
from spark_fast.pipelines import LoaderOptions, View, build_pipeline
from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert, convert_part
from spark_fast.pipelines.convert.conversion_parts import Part
from spark_fast.pipelines.convert.merge import merge
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.pipelines.bands import bands, dicom_of, npy_of, npz_of, png_of, tiff_of
from tests.pipelines.convert.test_conversion import contents, stopped_after
from tests.pipelines.damage import flip
from tests.pipelines.tars import tar_of

KINDS = [(1, "uint16"), (4, "uint8"), (12, "uint16"), (5, "float32"), (2, "int16"), (3, "float16"), (1, "uint32")]


def stored(data: bytes, channels: int, **options: object) -> np.ndarray:
    return np.load(io.BytesIO(BandRecords(0, in_chans=channels, **options).reencoded(data).content))


def tiffs(root: Path, count: int = 13, channels: int = 5, dtype: str = "uint16") -> Path:
    """Class folders of TIFF files."""
    for i in range(count):
        path = root / f"c{i % 2}" / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff_of(bands(i, 60, 80, channels, dtype), planarconfig="contig"))
    return root


def settings(channels: int = 5, side: int = 0, **options: object) -> ConvertSettings:
    return ConvertSettings(BandRecords(side, in_chans=channels, **options), images_per_shard=4)


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_what_is_not_resized_is_stored_bit_by_bit(channels, dtype):
    pixels = bands(1, channels=channels, dtype=dtype)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    big = pixels.astype(pixels.dtype.newbyteorder(">"))
    for found in (
        stored(npy_of(pixels), channels),
        stored(npy_of(big), channels),
        stored(npy_of(first), channels, channels_first=True),
        stored(npz_of(a=pixels, b=first), channels, npz_key="a"),
        stored(tiff_of(first, planarconfig="separate", compression="zlib"), channels) if channels > 1 else pixels,
    ):
        assert found.dtype == pixels.dtype == np.dtype(dtype)
        assert found.shape == pixels.shape
        assert (found == pixels).all()


def test_pictures_and_scans_keep_their_depth():
    grey = bands(1, channels=1)
    assert (stored(png_of(grey), 1) == grey).all()
    assert (stored(dicom_of(grey[:, :, 0], RescaleSlope="2", RescaleIntercept="-5"), 1) == grey * 2.0 - 5).all()


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_a_larger_image_is_resized_in_float_and_rounded_to_its_own_numbers(channels, dtype):
    pixels = bands(1, 120, 160, channels, dtype)
    found = np.load(io.BytesIO(BandRecords(48, in_chans=channels).reencoded(npy_of(pixels)).content))
    planes = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    exact = torch.nn.functional.interpolate(planes, size=(48, 64), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    assert found.shape == (48, 64, channels)
    assert found.dtype == np.dtype(dtype)
    rounding = 0.5 if found.dtype.kind in "ui" else np.finfo(dtype).eps
    limit = np.abs(pixels.astype(np.float64)).max()
    assert np.abs(found - exact.numpy()).max() <= rounding + limit * 2e-6


def test_where_a_curve_overshoots_the_numbers_do_not_wrap_around():
    for dtype in ("uint8", "uint16", "int16", "uint32", "int32"):
        limits = np.iinfo(dtype)
        edge = np.full((80, 80, 1), limits.min, dtype)
        edge[:, 40:] = limits.max
        found = np.load(io.BytesIO(BandRecords(20, in_chans=1).reencoded(npy_of(edge)).content))
        assert (found[:, :8] < limits.max // 8).all()
        assert (found[:, 12:] > limits.max // 8 * 7).all()


def test_an_image_is_never_enlarged_and_a_longer_side_can_be_asked_for():
    pixels = bands(1)
    assert BandRecords(256, in_chans=5).reencoded(npy_of(pixels)).content == npy_of(pixels)
    found = BandRecords(0, 40, in_chans=5).reencoded(npy_of(pixels)).pixels
    assert found.shape == (30, 40, 5)


def test_a_record_of_other_channels_or_not_finite_is_refused():
    with pytest.raises(ImageError, match="it has 5 channels where --in_chans is 4"):
        BandRecords(in_chans=4).reencoded(npy_of(bands(1)))
    broken = bands(1, dtype="float32")
    broken[3, 4, 2] = np.nan
    with pytest.raises(ImageError, match="1 of its 24000 numbers are NaN or infinite"):
        BandRecords(in_chans=5).reencoded(npy_of(broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 0}, "in_chans must be 1 or more, got 0"),
        ({"in_chans": 1, "max_pixels": 0}, "max_pixels must be 1"),
        ({"in_chans": 1, "short_side": 3, "max_side": 3}, "exclude each other"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        BandRecords(**options)


def test_shards_hold_what_the_folder_holds_in_a_form_any_tool_reads(tmp_path):
    root = tiffs(tmp_path / "src")
    ((_, manifest),) = convert(root, tmp_path / "out", settings())
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.count, manifest.in_chans, manifest.classes) == (13, 5, ["c0", "c1"])
    assert verify_shards(tmp_path / "out", workers=2) == []
    folder, shards = detect_source(root), detect_source(tmp_path / "out")
    assert shards.labels.tolist() == folder.labels.tolist()
    assert shards.fingerprint() == folder.fingerprint()
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        names = tar.getnames()
        key = names[0].removesuffix(".npy")
        assert names[:2] == [f"{key}.npy", f"{key}.cls"]
        number = int(key.split("-")[0])
        assert (np.load(io.BytesIO(tar.extractfile(names[0]).read())) == bands(int(key.split("-")[1]))).all()
        assert int(tar.extractfile(names[1]).read()) == folder.labels[number]
    lines = (tmp_path / "out" / "shard-000000.idx").read_text().splitlines()
    assert lines[1].split()[0::4][:2] == ["npy", "cls"]


def batches(path: Path, channels: int, **options: object) -> list[torch.Tensor]:
    asked = LoaderOptions(6, input_size=32, in_chans=channels, seed=1, view=View(rot90=True), **options)
    pipeline = build_pipeline(path, asked)
    try:
        return [batch.images for batch in pipeline.epoch(0)]
    finally:
        pipeline.close()


def test_training_on_shards_is_training_on_the_folder(tmp_path):
    root = tiffs(tmp_path / "src")
    convert(root, tmp_path / "out", settings())
    for scale in ("dtype", "none"):
        for a, b in zip(batches(root, 5, scaling=scale), batches(tmp_path / "out", 5, scaling=scale), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)  # the statistics are summed in another order
    given = {"mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (1.0, 2.0, 3.0, 4.0, 5.0)}
    for a, b in zip(batches(root, 5, **given), batches(tmp_path / "out", 5, **given), strict=True):
        assert torch.equal(a, b)


def test_tars_of_another_program_are_trained_on_and_converted_as_its_folder_is(tmp_path):
    members = {}
    for i in range(8):
        members |= {f"{i:03d}.npy": npy_of(bands(i)), f"{i:03d}.cls": b"%d" % (i % 2)}
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(tar_of(members))
    convert(tmp_path / "tars", tmp_path / "out", settings())
    assert detect_source(tmp_path / "out").labels.tolist() == [0, 1] * 4
    for a, b in zip(batches(tmp_path / "tars", 5), batches(tmp_path / "out", 5), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_trainer_normalises_by_the_manifests_statistics_unless_told_otherwise(tmp_path, caplog):
    caplog.set_level("INFO")
    root = tiffs(tmp_path / "src", 6)
    ((_, manifest),) = convert(root, tmp_path / "out", settings())
    for scale in ("dtype", "percentile", "none"):
        pipeline = build_pipeline(tmp_path / "out", LoaderOptions(4, input_size=32, in_chans=5, scaling=scale))
        assert pipeline.statistics.to_dict() == manifest.statistics[scale]
        pipeline.close()
        assert f"the statistics are those of the conversion, --scale {scale}" in caplog.text
    assert "measured on" not in caplog.text
    asked = LoaderOptions(4, input_size=32, in_chans=5, scaling="none", std=(1.0,) * 5)
    pipeline = build_pipeline(tmp_path / "out", asked)
    assert pipeline.statistics.std == asked.std
    assert list(pipeline.statistics.mean) == manifest.statistics["none"]["mean"]
    pipeline.close()


def test_how_arrays_were_laid_out_is_no_matter_once_they_are_converted(tmp_path):
    for i in range(4):
        path = tmp_path / "src" / f"{i}.npy"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(npy_of(np.ascontiguousarray(bands(i).transpose(2, 0, 1))))
    convert(tmp_path / "src", tmp_path / "out", settings(channels_first=True))
    pipeline = build_pipeline(tmp_path / "out", LoaderOptions(4, input_size=32, in_chans=5, channels_first=True))
    assert next(iter(pipeline.epoch(0))).images.shape == (4, 5, 32, 32)
    pipeline.close()


@pytest.mark.parametrize(
    ("channels", "asked", "message"),
    [
        (5, {}, "holds images of 5 channels, stored losslessly: use --in_chans 5$"),
        (5, {"in_chans": 4}, "use --in_chans 5$"),
        (3, {}, "of 3 channels, stored losslessly: use --in_chans 3 --scale dtype, or percentile or none$"),
        (3, {"pipeline": "dali"}, "use --in_chans 3 --scale dtype"),
    ],
)
def test_asking_for_other_images_than_were_stored_says_what_to_ask_for(tmp_path, channels, asked, message):
    convert(tiffs(tmp_path / "src", 4, channels), tmp_path / "out", settings(channels))
    with pytest.raises(SettingsError, match=message):
        build_pipeline(tmp_path / "out", LoaderOptions(4, input_size=32, **asked))


def test_a_conversion_that_was_stopped_ends_with_the_same_bytes(tmp_path):
    root = tiffs(tmp_path / "src")
    convert(root, tmp_path / "whole", settings(side=40))
    with stopped_after(7) as stop:
        convert(root, tmp_path / "out", settings(side=40), on_progress=stop)
    assert "manifest.json" not in contents(tmp_path / "out")
    assert "shard-000000.json" in contents(tmp_path / "out")
    convert(root, tmp_path / "out", settings(side=40))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_merge_to_the_bytes_of_one_machine(tmp_path):
    root = tiffs(tmp_path / "src", dtype="float32")
    convert(root, tmp_path / "whole", settings())
    for number in (2, 1, 3):
        convert_part(root, tmp_path / "out", settings(), Part(number, 3))
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_a_byte(tmp_path):
    root = tiffs(tmp_path / "src")
    convert(root, tmp_path / "one", settings(side=40), workers=1)
    convert(root, tmp_path / "two", settings(side=40), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bad_files_are_named_and_left_out_and_the_rest_keeps_its_place(tmp_path):
    root = tiffs(tmp_path / "src")
    (root / "c0" / "2.tif").write_bytes(b"")
    (root / "c1" / "3.tif").write_bytes(tiff_of(bands(1, channels=4), planarconfig="contig"))
    (root / "c1" / "5.tif").write_bytes((root / "c1" / "5.tif").read_bytes()[:-100])
    rgba = np.concatenate([bands(1, channels=5), bands(2, channels=1)], axis=2)
    (root / "c1" / "7.tif").write_bytes(tiff_of(rgba, planarconfig="contig", extrasamples=[0, 0, 0, 0, 2]))
    ((_, manifest),) = convert(root, tmp_path / "out", settings())
    assert {entry["name"]: entry["reason"][:30] for entry in manifest.refused} == {
        "c0/2.tif": "the file has zero bytes",
        "c1/3.tif": "it has 4 channels where --in_c",
        "c1/5.tif": "the file is cut short: its hea",
    }
    assert [entry["name"] for entry in manifest.repaired] == ["c1/7.tif"]
    assert [(loss["kind"], loss["images"]) for loss in manifest.losses] == [("of 5 channels and transparency", 1)]
    shards = detect_source(tmp_path / "out")
    assert len(shards) == 10
    names = [shards.name(i).split("-")[-1] for i in range(10)]
    assert names == [f"{i}.npy" for i in (0, 10, 12, 4, 6, 8, 1, 11, 7, 9)]  # as listed, without the bad


def test_a_folder_of_nothing_readable_is_no_conversion(tmp_path):
    with pytest.raises(DataError, match=r"none of the 13 images of .* is readable; the first: .*5 channels"):
        convert(tiffs(tmp_path / "src"), tmp_path / "out", settings(4))


def test_another_number_of_channels_needs_another_folder(tmp_path):
    root = tiffs(tmp_path / "src", 4)
    convert(root, tmp_path / "out", settings())
    with pytest.raises(SettingsError, match="converted from other data or with other settings"):
        convert(root, tmp_path / "out", settings(6))


@pytest.mark.parametrize("what", ["image", "cut", "missing"])
def test_verify_and_training_find_damage_in_a_record(tmp_path, what):
    convert(tiffs(tmp_path / "src"), tmp_path / "out", settings())
    shard = tmp_path / "out" / "shard-000001.tar"
    if what == "image":
        flip(shard, 5000)
    elif what == "cut":
        shard.write_bytes(shard.read_bytes()[:-4000])
    else:
        shard.unlink()
    faults = verify_shards(tmp_path / "out")
    assert faults
    assert all("shard-000001" in fault for fault in faults)
    if what != "image":
        with pytest.raises(DataError, match=r"shard-000001.tar"):
            build_pipeline(tmp_path / "out", LoaderOptions(4, input_size=32, in_chans=5))
        return
    pipeline = build_pipeline(
        tmp_path / "out", LoaderOptions(4, input_size=32, in_chans=5, max_bad_fraction=0.5, view=View(in_order=True))
    )
    assert all(torch.isfinite(batch.images).all() for batch in pipeline.epoch(0))
    assert pipeline.bad_images.substituted == 1
    pipeline.close()


def test_a_record_whose_numbers_are_none_is_found_by_verify(tmp_path):
    """The checksum fits, the image does not: a manifest that says four channels where records have five."""
    convert(tiffs(tmp_path / "src", 4), tmp_path / "out", settings())
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["made_from"]["images"]["in_chans"] = 4
    from spark_fast.pipelines.sources.shard_format import sealed

    (other / "manifest.json").write_bytes(sealed(json.dumps(manifest).encode()))
    faults = verify_shards(other)
    assert len(faults) == 4
    assert all("it has 5 channels where --in_chans is 4" in fault for fault in faults)
