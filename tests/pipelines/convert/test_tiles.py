from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_fast.errors import DataError, ImageError, SettingsError
from spark_fast.pipelines import LoaderOptions, build_pipeline
from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.tiles import TileSource, Tiling
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.detect import detect_source, images_to_convert
from spark_fast.pipelines.sources.folder import folder_source
from spark_fast.pipelines.transforms.bands.expected import Expected
from tests.commands import HANG_SECONDS
from tests.pipelines.bands import bands, npy_of, tiff_of
from tests.pipelines.convert.test_conversion import contents, stopped_after
from tests.pipelines.tars import tar_of

ROOT = Path(__file__).parents[3]


def settings(channels: int = 5, tile: int = 32, stride: int = 24, side: int = 0) -> ConvertSettings:
    return ConvertSettings(BandRecords(side, in_chans=channels, tiling=Tiling(tile, stride)), images_per_shard=7)


def scenes(root: Path) -> dict[str, np.ndarray]:
    """Two classes, three scenes of several sizes and kinds of file."""
    made = {
        "city/a.tif": (
            bands(1, 70, 100),
            lambda p: tiff_of(p, planarconfig="contig", tile=(16, 32), compression="zlib"),
        ),
        "city/b.npy": (bands(2, 32, 32), npy_of),
        "sea/c.tif": (bands(3, 20, 90), lambda p: tiff_of(p, planarconfig="contig", rowsperstrip=8)),
    }
    for name, (pixels, write) in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(write(pixels))
    return {name: pixels for name, (pixels, _) in made.items()}


def test_the_last_tile_ends_at_the_edge():
    windows = Tiling(32, 32).windows(70, 100)
    assert [(w.top, w.left) for w in windows] == [(top, left) for top in (0, 32, 38) for left in (0, 32, 64, 68)]
    assert {(w.height, w.width) for w in windows} == {(32, 32)}
    assert [w.left for w in Tiling(32, 32).windows(32, 96)] == [0, 32, 64]  # fits: none is doubled
    assert [w.left for w in Tiling(32, 50).windows(32, 100)] == [0, 50, 68]
    assert Tiling(32, 32).windows(20, 90)[0] == (0, 0, 20, 32)  # a scene that is smaller
    assert Tiling(32, 32).windows(20, 10) == [(0, 0, 20, 10)]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_tiles_lie_in_the_scene_and_leave_nothing_out(height, width, tile, stride):
    covered = np.zeros((height, width), bool)
    windows = Tiling(tile, min(stride, tile)).windows(height, width)
    for top, left, high, wide in windows:
        assert covered[top : top + high, left : left + wide].shape == (min(tile, height), min(tile, width))
        covered[top : top + high, left : left + wide] = True
    assert covered.all()
    assert len(set(windows)) == len(windows)


def test_every_tile_is_its_part_of_the_scene_with_its_name_and_label(tmp_path):
    pixels = scenes(tmp_path / "src")
    ((_, manifest),) = convert(tmp_path / "src", tmp_path / "out", settings())
    assert verify_shards(tmp_path / "out") == []
    shards = detect_source(tmp_path / "out")
    expected = []
    for number, (name, scene) in enumerate(sorted(pixels.items())):
        for top, left, height, width in Tiling(32, 24).windows(*scene.shape[:2]):
            key = f"{Path(name).stem}-y{top}-x{left}.npy"
            expected.append((key, number == 2, scene[top : top + height, left : left + width]))
    assert manifest.count == len(shards) == len(expected) == 17
    for i, (key, is_sea, tile) in enumerate(expected):
        assert shards.name(i).split(":")[1].split("-", 1)[1] == key
        assert shards.labels[i] == is_sea
        assert (np.load(io.BytesIO(shards.read(i))) == tile).all()


def test_tiles_are_reduced_and_trained_on_as_any_image(tmp_path):
    scenes(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", settings(side=16))
    shards = detect_source(tmp_path / "out")
    assert {np.load(io.BytesIO(shards.read(i))).shape for i in range(len(shards))} == {(16, 16, 5), (16, 26, 5)}
    pipeline = build_pipeline(tmp_path / "out", LoaderOptions(4, input_size=32, in_chans=5))
    assert next(iter(pipeline.epoch(0))).images.shape == (4, 5, 32, 32)
    pipeline.close()


def test_the_place_of_a_tile_survives_a_long_name(tmp_path):
    long = "S2A_MSIL1C_20170105T013442_N0204_R031_T53NMJ_20170105T013443_and_more"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / f"{long}.npy").write_bytes(npy_of(bands(1, 64, 64)))
    convert(tmp_path / "src", tmp_path / "out", settings(stride=32))
    shards = detect_source(tmp_path / "out")
    names = [shards.name(i).split(":")[1] for i in range(4)]
    assert [name[name.index("-y") :] for name in names] == ["-y0-x0.npy", "-y0-x32.npy", "-y32-x0.npy", "-y32-x32.npy"]
    assert all(name.split("-")[1] in long for name in names)


def test_a_stopped_conversion_of_tiles_ends_with_the_same_bytes(tmp_path):
    scenes(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "whole", settings())
    with stopped_after(9) as stop:
        convert(tmp_path / "src", tmp_path / "out", settings(), on_progress=stop)
    assert "shard-000000.json" in contents(tmp_path / "out")
    convert(tmp_path / "src", tmp_path / "out", settings())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(SettingsError, match="with other settings"):
        convert(tmp_path / "src", tmp_path / "out", settings(stride=23))


def test_bad_scenes_and_bad_tiles_are_named_and_left_out(tmp_path):
    scenes(tmp_path / "src")
    (tmp_path / "src/city/empty.tif").write_bytes(b"")
    (tmp_path / "src/city/other.npy").write_bytes(npy_of(bands(1, channels=4)))
    broken = bands(4, 64, 32, dtype="float32")
    broken[50, 3, 2] = np.nan
    (tmp_path / "src/sea/nan.npy").write_bytes(npy_of(broken))
    ((_, manifest),) = convert(tmp_path / "src", tmp_path / "out", settings(stride=32))
    assert {entry["name"]: entry["reason"] for entry in manifest.refused} == {
        "city/empty.tif": "windows can be read only from TIFF and .npy; it starts with b''",
        "city/other.npy": "it has 4 channels where --in_chans is 5",
        "sea/nan-y32-x0.npy": "1 of its 5120 numbers are NaN or infinite",
    }
    assert manifest.count == 12 + 1 + 3 + 1


def test_scenes_of_which_none_is_readable_are_no_conversion(tmp_path):
    scenes(tmp_path / "src")
    with pytest.raises(DataError, match=r"none of the 3 images of .* is readable"):
        convert(tmp_path / "src", tmp_path / "out", settings(4))


def test_a_scene_that_changes_while_it_is_converted_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"")
    source = TileSource.of(folder_source(tmp_path, endings=(".npy",)), Tiling(32, 32), Expected(5))
    path.write_bytes(npy_of(bands(1)))
    with pytest.raises(ImageError, match="has changed since"):
        source.read(0)


@pytest.mark.parametrize(("tile", "stride"), [(0, 3), (3, 0), (-1, 4)])
def test_tiles_of_no_size_are_refused(tile, stride):
    with pytest.raises(SettingsError, match="tile and stride must be 1 pixel or more"):
        Tiling(tile, stride)


def test_a_tile_larger_than_an_image_may_be_is_refused():
    with pytest.raises(SettingsError, match="a tile of side 300 has more pixels than max_pixels allows"):
        BandRecords(in_chans=1, max_pixels=80000, tiling=Tiling(300, 300))


def test_scenes_in_a_tar_are_to_be_unpacked(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.tif": tiff_of(bands(1), planarconfig="contig")}))
    with pytest.raises(SettingsError, match=r"--tile reads windows of files, not of tars: unpack .*a.tar first"):
        TileSource.of(images_to_convert(tmp_path / "a.tar"), Tiling(32, 32), Expected(5))


CONVERT = """
from spark_fast.cli.convert import main
from spark_fast.operating_system import peak_resident_bytes
assert main() == 0
print(peak_resident_bytes() >> 20)
"""


@pytest.mark.slow
def test_a_scene_of_ten_thousand_pixels_a_side_is_never_in_memory_as_a_whole(tmp_path):
    (tmp_path / "src").mkdir()
    side, channels = 10_000, 12
    with (tmp_path / "src" / "scene.npy").open("wb") as file:  # 2.4 GB, of which the disk holds the header
        header = {"descr": "<u2", "fortran_order": False, "shape": (side, side, channels)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * side * side * channels)
    words = [sys.executable, "-c", CONVERT, str(tmp_path / "src"), str(tmp_path / "out")]
    words += ["--in_chans", "12", "--tile", "512", "--stride", "4000", "--workers", "1"]  # 1: in the process itself
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "16 images" in done.stdout
    assert int(done.stdout.split()[-1]) < 1200  # MiB: half of the scene, the libraries' 500 included
