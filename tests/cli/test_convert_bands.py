"""The converter's flags for images of any channels and depth, as a person gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spark_fast.cli.convert import main
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.commands import run_here
from tests.pipelines.bands import bands, npy_of, npz_of


def arrays(root: Path, channels: int, count: int = 8, dtype: str = "uint16") -> Path:
    root.mkdir()
    for i in range(count):
        (root / f"{i}.npy").write_bytes(npy_of(bands(i, 70, 80, channels, dtype)))
    return root


def test_images_of_four_channels_are_converted_and_verified(tmp_path):
    src, dst = arrays(tmp_path / "src", 4), tmp_path / "out"
    (src / "8.npy").write_bytes(b"")
    done = run_here(main, src, dst, "--in_chans=4", "--short_side=64", "--workers=1", "--verify")
    assert "8 images in 1 shards" in done.stdout
    assert "0 stored with a loss, 1 left out as unreadable (listed in manifest.json)" in done.stdout
    assert "verified" in done.stdout


def test_three_channels_of_any_depth_are_stored_losslessly_when_asked_for(tmp_path):
    src = arrays(tmp_path / "src", 3)
    run_here(main, src, tmp_path / "out", "--lossless", "--short_side=0", "--workers=1")
    assert read_manifest(tmp_path / "out").in_chans == 3
    assert detect_source(tmp_path / "out").read(5) == (src / "5.npy").read_bytes()
    assert "no images in" in run_here(main, src, tmp_path / "photographs", code=3).stderr


def test_an_archive_of_arrays_and_tiles_of_it_are_told_apart(tmp_path):
    (tmp_path / "src").mkdir()
    first = np.ascontiguousarray(bands(1).transpose(2, 0, 1))
    (tmp_path / "src" / "a.npz").write_bytes(npz_of(image=first, mask=first[0]))
    words = [tmp_path / "src", tmp_path / "out", "--in_chans=5", "--channels_first", "--npz_key=image", "--workers=1"]
    run_here(main, *words)
    assert detect_source(tmp_path / "out").read(0) == npy_of(bands(1))
    told = run_here(main, *words, "--overwrite", "--tile=32", code=3).stderr
    assert "windows can be read only from TIFF and .npy" in told


def test_tiles_are_cut_at_full_size_unless_a_side_is_given(tmp_path):
    src = arrays(tmp_path / "src", 1, 1)
    words = [src, tmp_path / "out", "--in_chans=1", "--tile=64", "--workers=1"]
    assert "4 images in" in run_here(main, *words).stdout
    assert len(detect_source(tmp_path / "out").read(0)) == len(npy_of(bands(1, 64, 64, 1)))
    assert "36 images in" in run_here(main, *words, "--overwrite", "--stride=2", "--short_side=8").stdout
    assert len(detect_source(tmp_path / "out").read(0)) == len(npy_of(bands(1, 8, 8, 1)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stride=4"], "--stride needs --tile"),
        (["--tile=4", "--stride=-1"], "tile and stride must be 1 pixel or more, got 4 and -1"),
        (["--in_chans=0"], "in_chans must be 1 or more, got 0"),
        (["--channels_first"], "need --lossless, --in_chans or --tile"),
        (["--npz_key=a"], "need --lossless, --in_chans or --tile"),
        (["--lossless", "--quality=95"], "--quality is for JPEGs, but these images are stored losslessly"),
        (["--in_chans=1", "--format=ffcv"], "--format ffcv stores only three channels of 8 bits: use --format shards"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, flags, message):
    assert message in run_here(main, arrays(tmp_path / "src", 3, 1), tmp_path / "out", *flags, code=2).stderr
    assert not (tmp_path / "out").exists()
