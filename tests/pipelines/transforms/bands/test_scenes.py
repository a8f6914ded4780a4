from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.scenes import Window, open_scene
from tests.pipelines.bands import bands, dicom_of, npy_of, npz_of, png_of, tiff_of

WINDOWS = [(0, 0, 70, 100), (0, 0, 16, 16), (13, 29, 31, 47), (69, 99, 1, 1), (40, 0, 30, 100), (16, 32, 16, 32)]
TIFFS = {
    "one piece": {},
    "strips": {"rowsperstrip": 9},
    "packed strips": {"rowsperstrip": 9, "compression": "zlib"},
    "packed, one strip": {"rowsperstrip": 70, "compression": "lzw"},
    "predicted": {"rowsperstrip": 16, "compression": "zstd", "predictor": True},
    "predicted, not packed": {"tile": (32, 16)},
    "tiles": {"tile": (16, 32), "compression": "zlib"},
    "tiles, predicted": {"tile": (64, 48), "compression": "zlib", "predictor": True},
    "big": {"bigtiff": True, "tile": (32, 32), "compression": "zstd"},
    "big-endian": {"byteorder": ">"},
    "big-endian tiles": {"byteorder": ">", "tile": (32, 32), "compression": "zlib"},
}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def check_windows(path: Path, pixels: np.ndarray, **options: object) -> None:
    with open_scene(path, Expected(pixels.shape[2], **options)) as scene:
        assert (scene.height, scene.width) == pixels.shape[:2]
        for top, left, height, width in WINDOWS:
            found = scene.read(Window(top, left, height, width))
            assert found.dtype.newbyteorder("=") == pixels.dtype
            assert (found == pixels[top : top + height, left : left + width]).all()


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (4, "uint8"), (5, "float32")])
def test_a_window_of_a_tiff_is_that_part_of_the_scene(tmp_path, kind, channels, dtype):
    pixels = bands(1, 70, 100, channels, dtype)
    layouts = [(pixels, {"planarconfig": "contig"}), (np.moveaxis(pixels, 2, 0), {"planarconfig": "separate"})]
    for array, layout in layouts if channels > 1 else [(pixels[:, :, 0], {})]:
        check_windows(
            written(tmp_path / "a.tif", tiff_of(np.ascontiguousarray(array), **layout, **TIFFS[kind])), pixels
        )


@pytest.mark.parametrize("kind", ["one piece", "packed strips", "tiles"])
def test_a_window_of_a_page_a_channel(tmp_path, kind):
    pixels, buffer = bands(1, 70, 100), io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for channel in range(5):
            writer.write(pixels[:, :, channel], photometric="minisblack", contiguous=False, **TIFFS[kind])
    check_windows(written(tmp_path / "a.tif", buffer.getvalue()), pixels)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "<f4", "float64"])
def test_a_window_of_an_array(tmp_path, dtype):
    pixels = bands(1, 70, 100, 5, "uint8").astype(dtype)
    path = written(tmp_path / "a.npy", npy_of(pixels))
    check_windows(path, pixels.astype(pixels.dtype.newbyteorder("=")))
    first = npy_of(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    check_windows(written(path, first), pixels.astype(pixels.dtype.newbyteorder("=")), channels_first=True)
    check_windows(written(path, npy_of(pixels[:, :, 0].copy())), pixels[:, :, :1].astype(dtype.replace(">", "<")))


def test_parts_that_a_file_leaves_out_are_its_no_data(tmp_path):
    pixels = bands(1, 64, 64, 1)
    path = written(tmp_path / "a.tif", tiff_of(pixels[:, :, 0], tile=(32, 32), compression="zlib"))
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite((*counts.value[:3], 0))
    pixels[32:, 32:] = 0
    with open_scene(path, Expected(1)) as scene:
        assert (scene.read(Window(5, 5, 40, 40)) == pixels[5:45, 5:45]).all()


PACKED = tiff_of(bands(1), planarconfig="contig", compression="zlib", rowsperstrip=10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "windows can be read only from TIFF and .npy; it starts with b''"),
        (png_of(bands(1, channels=1)), "windows can be read only from TIFF and .npy"),
        (npz_of(a=bands(1)), "windows can be read only from TIFF and .npy"),
        (dicom_of(bands(1)[:, :, 0]), "windows can be read only from TIFF and .npy"),
        (npy_of(np.asfortranarray(bands(1))), "an array in Fortran order"),
        (npy_of(bands(1, channels=4)), "it has 4 channels where --in_chans is 5"),
        (npy_of(bands(1).astype(complex)), "its numbers have type complex128"),
        (npy_of(bands(1))[:-10], "the file is cut short: 790 bytes at"),
        (tiff_of(bands(1, channels=4), planarconfig="contig"), "it has 4 channels where --in_chans is 5"),
        (tiff_of(bands(1), planarconfig="contig")[:-100], "the file is cut short"),
        (PACKED[:-100], "the file is cut short: its header places"),
        (PACKED[:30], "damaged, or not read"),
        (PACKED[:5000] + bytes(400) + PACKED[5400:], "damaged, or not read"),
        (b"II*\0" + bytes(100), "damaged, or not read|no page"),
    ],
)
def test_what_cannot_be_read_says_why_and_says_it_again(tmp_path, data, message):
    path, reasons = written(tmp_path / "a", data), set()
    for _ in range(2):
        with pytest.raises(ImageError, match=message) as error, open_scene(path, Expected(5)) as scene:
            scene.read(Window(0, 0, scene.height, scene.width))
        reasons.add(str(error.value))
    assert len(reasons) == 1


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"), open_scene(tmp_path / "pipe", Expected(5)):
        pass
    with pytest.raises(IsADirectoryError), open_scene(tmp_path, Expected(5)):
        pass
    with pytest.raises(FileNotFoundError), open_scene(tmp_path / "none", Expected(5)):
        pass


def test_a_strip_that_would_fill_the_memory_is_refused(tmp_path):
    one = tiff_of(bands(1), planarconfig="contig", compression="zlib", rowsperstrip=60)
    with (
        pytest.raises(
            ImageError, match="a TIFF whose strips of 80 x 60 pixels can only be unpacked whole: write it in"
        ),
        open_scene(written(tmp_path / "a.tif", one), Expected(5, max_pixels=4799)),
    ):
        pass


@pytest.mark.parametrize("kind", ["tiff in tiles", "tiff in strips", "tiff as it is", "array"])
def test_a_window_takes_the_memory_of_a_window(tmp_path, kind):
    scene = np.zeros((1200, 1000, 12), np.uint16)  # 28.8 MB
    layouts = {
        "tiff in tiles": {"tile": (128, 128), "compression": "zlib"},
        "tiff in strips": {"rowsperstrip": 32, "compression": "zlib"},
        "tiff as it is": {},
    }
    data = npy_of(scene) if kind == "array" else tiff_of(scene, planarconfig="contig", **layouts[kind])
    path = written(tmp_path / "scene", data)
    tracemalloc.start()
    try:
        with open_scene(path, Expected(12)) as opened:
            for left in (0, 400, 800):
                opened.read(Window(300, left, 200, 200))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < scene.nbytes / 5
