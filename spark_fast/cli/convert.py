"""Convert images into shards, or into a .beton for FFCV. Training reads them faster than the original files.

    spark-fast-convert /data/imagenet /data/imagenet_256

Then train with --data_path /data/imagenet_256. A conversion that was stopped continues with the same command.
Exit codes: 0 done, 2 settings, 3 data, 6 storage, 130 Ctrl-C.

To use several machines, add --part I/N on machine I of N. When all files are in one folder, run once:

    spark-fast-convert /data/imagenet_256 --merge
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from spark_fast.cli.start import start
from spark_fast.cli.tool import run_tool
from spark_fast.errors import DataError, SettingsError
from spark_fast.operating_system import usable_cores
from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.beton_writer import BetonSettings
from spark_fast.pipelines.convert.conversion import ConvertSettings, Progress, convert, convert_part
from spark_fast.pipelines.convert.conversion_parts import Part
from spark_fast.pipelines.convert.merge import merge
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.tiles import Tiling
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.sources.shard_format import Manifest
from spark_fast.pipelines.transforms.decode import MEGAPIXEL
from spark_fast.reporting.progress_bar import FittingProgress, is_live, text

LINE_SECONDS = 10  # between progress lines when the output is no terminal


@dataclass
class Bands:
    """Images that are not photographs: their values are stored unchanged, in .npy records."""

    in_chans: int = 3
    """Channels of the images; any number but 3 is stored losslessly."""
    lossless: bool = False
    """Store three channels losslessly, too, instead of as 8-bit JPEGs."""
    channels_first: bool = False
    """Arrays in .npy and .npz are (C, H, W), not (H, W, C)."""
    npz_key: str = ""
    """Name of the array to read, for an .npz with several arrays."""
    tile: int = 0
    """Cut large scenes (TIFF, .npy) into tiles of this side, read one by one; lossless, short_side 0 by default."""
    stride: int = 0
    """Pixels from one tile to the next; 0: the side of a tile, without overlap."""

    def settings(self, size: Reencode) -> BandRecords | None:
        """How they are stored; None: photographs are."""
        if self.stride and not self.tile:
            raise SettingsError("--stride needs --tile")
        if self.in_chans == 3 and not (self.lossless or self.tile):
            if self.channels_first or self.npz_key:
                raise SettingsError("--channels_first and --npz_key need --lossless, --in_chans or --tile")
            return None
        if size.quality != Reencode.quality:
            raise SettingsError("--quality is for JPEGs, but these images are stored losslessly: leave it out")
        return BandRecords(
            size.short_side,
            size.max_side,
            size.max_pixels,
            in_chans=self.in_chans,
            channels_first=self.channels_first,
            npz_key=self.npz_key,
            tiling=Tiling(self.tile, self.stride or self.tile) if self.tile else None,
        )


PHOTOGRAPHS = Bands()


def convert_images(
    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None,
    *,
    short_side: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 256)")] = None,
    max_side: int = 0,
    quality: int = 90,
    max_pixels: int = 64,
    images_per_shard: int = 0,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    bands: Annotated[Bands, tyro.conf.arg(name="")] = PHOTOGRAPHS,
    format: Literal["shards", "ffcv", "both"] = "shards",
    ffcv_raw: float = 0.0,
    part: str = "",
    merge_parts: Annotated[bool, tyro.conf.arg(name="merge")] = False,
    verify: Annotated[bool, tyro.conf.arg(name="verify")] = False,
) -> int:
    """Convert a folder of images into shards.

    Args:
        src: ImageNet folder (train/, val/, or the tars as downloaded), tar, folder of class folders, of images or of
            WebDataset tars, or file list. With --merge: the folder of the parts.
        dst: Folder for the shards: a new or empty one, or an unfinished conversion.
        short_side: Reduce larger images to this shorter side; 0 keeps their size.
        max_side: Reduce larger images to this longer side, instead of short_side.
        quality: JPEG quality of photographs.
        max_pixels: Largest image in million (2**20) pixels; larger ones are left out, because they may fill the memory.
        images_per_shard: Images per shard; 0: 4096 for ImageNet (about 120 MB), fewer for small data sets.
        seed: Decides the order of the images in the shards.
        workers: Number of processes; 0: one per core.
        overwrite: Delete an earlier conversion in dst first.
        format: Tar shards (any pipeline reads them), only a .beton for FFCV, or both.
        ffcv_raw: Share of the .beton's records, 0 to 1, stored as pixels: no decoding, six times the space.
        part: I/N: convert only the I-th of N parts; --merge joins them.
        merge_parts: Join the parts in a folder into one conversion, by writing its manifest.
        verify: Read everything again and compare: checksums, counts, indices, images.
    """
    short_side = (0 if max_side or bands.tile else 256) if short_side is None else short_side
    if images_per_shard < 0 or workers < 0:
        raise SettingsError("images_per_shard and workers must be counts, or 0 for the default")
    images = Reencode(short_side, max_side, quality, max_pixels * MEGAPIXEL)
    settings = ConvertSettings(bands.settings(images) or images, images_per_shard, seed)
    beton = _beton(format, ffcv_raw, settings)
    workers = workers or usable_cores()
    if merge_parts:
        if dst or part or overwrite:
            raise SettingsError("--merge takes only the folder of the parts, without --part or --overwrite")
        return _report(merge(src), verify, workers)
    if dst is None:
        raise SettingsError("SRC and DST are needed: the images to convert, and the folder for the shards")
    if part:
        if beton or overwrite or verify:
            raise SettingsError("--part does not work with --overwrite; give --format and --verify with --merge only")
        return _convert_part(src, dst, settings, Part.parse(part), workers)
    with Display() as display:
        show = display.show
        written = convert(src, dst, settings, workers=workers, overwrite=overwrite, beton=beton, on_progress=show)
    return _report(written, verify, workers)


def _beton(format: str, raw: float, settings: ConvertSettings) -> BetonSettings | None:
    if format == "shards":
        return None
    if isinstance(settings.images, BandRecords):
        raise SettingsError(f"--format {format} stores only three channels of 8 bits: use --format shards")
    require_ffcv(f"--format {format}")
    return BetonSettings(raw, alone=format == "ffcv")


def _convert_part(src: Path, dst: Path, settings: ConvertSettings, part: Part, workers: int) -> int:
    with Display() as display:
        written = convert_part(src, dst, settings, part, workers=workers, on_progress=display.show)
    for folder, manifest in written:
        print(f"{folder}: part {part} is done, {len(manifest.shards)} shards; --merge joins all parts")
    return 0


def _report(written: list[tuple[Path, Manifest]], verify_too: bool, workers: int) -> int:
    for folder, manifest in written:
        print(_summary(folder, manifest))
    if verify_too:
        faults = [f"{folder}/{fault}" for folder, _ in written for fault in verify_shards(folder, workers)]
        if faults:
            raise DataError("\n".join([*faults, f"{len(faults)} faults: convert again with --overwrite"]))
        print("verified: every shard, record and index is intact")
    return 0


def _summary(folder: Path, manifest: Manifest) -> str:
    size = sum(shard.bytes for shard in manifest.shards)
    made = f"{len(manifest.shards)} shards, {size / 1e6:.0f} MB"
    if manifest.beton is not None:
        whole = f"{manifest.beton.data.file}, {manifest.beton.data.bytes / 1e6:.0f} MB"
        made = whole if manifest.beton.alone else f"{made}, and {whole}"
    repaired = "stored with a loss" if manifest.in_chans else "converted to RGB JPEG"
    return (
        f"{folder}: {manifest.count} images in {made}; {len(manifest.repaired)} {repaired},"
        f" {len(manifest.refused)} left out as unreadable (listed in manifest.json)"
    )


class Display:
    """Progress as a bar on a terminal, as a line now and then elsewhere."""

    def __init__(self) -> None:
        console = Console()
        name, bar, count = text("{task.description}"), BarColumn(None), MofNCompleteColumn()
        speed, left = text("{task.fields[speed]}"), TimeRemainingColumn()
        self._bar = FittingProgress(
            (name, bar, count, speed, left),
            first_left_out=(speed, bar, left),
            console=console,
            disable=not is_live(console),
        )
        self._folder: Path | None = None

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Called after every image."""
        now = time.monotonic()
        if progress.folder != self._folder:
            self._folder, self._start, self._before, self._line = progress.folder, now, progress.done, now
            self._task = self._bar.add_task(progress.folder.name, total=progress.total, speed="")
        seconds = max(now - self._start, 1e-3)
        rate = (progress.done - self._before) / seconds
        speed = f"{rate:.0f} images/s, {progress.bytes / seconds / 1e6:.1f} MB/s"
        self._bar.update(self._task, completed=progress.done, speed=speed)
        if self._bar.disable and (now - self._line > LINE_SECONDS or progress.done == progress.total):
            self._line = now
            left = (progress.total - progress.done) / rate if rate else 0
            line = f"{progress.folder}: {progress.done}/{progress.total} images, {speed}, {left:.0f} s left"
            print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    kept = "interrupted. Finished shards are kept: the same command continues."
    return run_tool("convert", convert_images, argv, interrupted=kept)


if __name__ == "__main__":
    sys.exit(start("convert"))
