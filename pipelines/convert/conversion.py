"""Convert a folder of images, a list, or a tar, into shards, in several processes; restartable at any point.

The unit of work is a shard: which images go into it follows from the listing and the seed alone, so the
bytes do not depend on the number of processes. A finished shard leaves a small .json beside it; a restart
keeps the shards that have one and whose checksum agrees. The manifest comes last and the .json go.
One of N parts is every N-th shard; its .json stay, for `merge` to make the manifest of all.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from spark_fast.errors import DataError, SettingsError
from spark_fast.files import PARTIAL, file_sha256
from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.beton_writer import BetonSettings, mark, with_beton
from spark_fast.pipelines.convert.conversion_parts import Part, PartManifest, write_part
from spark_fast.pipelines.convert.output_dir import locked, storage
from spark_fast.pipelines.convert.process_pool import run_jobs
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.shard_job import ShardJob, write_job
from spark_fast.pipelines.convert.stored_statistics import statistics_by_scale
from spark_fast.pipelines.sampler import order
from spark_fast.pipelines.sources.detect import TARS, images_to_convert
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.listing.splits import SPLITS, find_splits
from spark_fast.pipelines.sources.losses import LossCount, counted
from spark_fast.pipelines.sources.shard_format import (
    BETON,
    FORMAT,
    INDEX_FILE,
    MANIFEST,
    Manifest,
    Record,
    ShardFile,
    read_manifest,
    shard_name,
    write_index,
    write_manifest,
)
from spark_fast.pipelines.sources.tars.webdataset import splits_of_tars
from spark_fast.pipelines.transforms.decode import MAX_PIXELS
from spark_fast.pipelines.transforms.pillow_pixels import Loss

logger = logging.getLogger("spark_fast.pipelines")

_OURS = re.compile(
    r"(shard-\d{6}\.(tar|idx|json)|part-\d{4}-of-\d{4}\.(json|lock)|manifest\.json|index\.npy|images\.beton(\.npy|\.alone)?)"
    r"(\.partial)?"
)


@dataclass(frozen=True)
class ConvertSettings:
    """Everything that decides the bytes written."""

    images: Reencode | BandRecords = field(default_factory=Reencode)
    images_per_shard: int = 0  # 0: 4096 (100 to 150 MB at short side 256), fewer for small data sets
    seed: int = 0

    def shard_size(self, num_samples: int) -> int:
        """Images per shard: small data sets are split so that there is work for several processes."""
        return self.images_per_shard or min(4096, max(256, -(-num_samples // 16)))


class Progress(NamedTuple):
    """How far the conversion of a split is."""

    folder: Path
    done: int  # images, kept ones of an earlier run included
    total: int
    bytes: int  # read in this run


def convert(
    src: Path,
    dst: Path,
    settings: ConvertSettings,
    *,
    workers: int = 1,
    overwrite: bool = False,
    beton: BetonSettings | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[tuple[Path, Manifest]]:
    """Convert SRC (a file list, a tar, a folder of images, of class folders or of tars of WebDataset, or one with
    train/, val/, test/ or their tars as downloaded).

    Each split gets a folder in DST, SRC without splits goes to DST itself. With `beton`, a .beton for FFCV is
    made of the shards. Returns the folders written and their manifests. Raises SettingsError, DataError or
    StorageError; whatever happens, only whole shards are left, and the same command continues from there.
    """
    with storage(dst):
        return [
            (folder, _convert_split(images, folder, settings, workers, overwrite, beton, on_progress))
            for images, folder in _splits(src, dst, settings.images.endings)
        ]


def convert_part(
    src: Path,
    dst: Path,
    settings: ConvertSettings,
    part: Part,
    *,
    workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[tuple[Path, PartManifest]]:
    """Write one part of what `convert` would, into DST; parts may share it. `merge` then joins them.

    Returns the folders and what this part put there. Raises as `convert` does, and is restartable like it.
    """
    with storage(dst):
        splits = _splits(src, dst, settings.images.endings)
        names = [folder.name for _, folder in splits] if splits[0][1] != dst else []
        return [
            (folder, _convert_part(images, folder, settings, part, names, workers, on_progress))
            for images, folder in splits
        ]


class _Images(NamedTuple):
    """What becomes one folder of shards."""

    path: Path
    split: str  # in a folder of tars of several: those whose names say so


def _splits(src: Path, dst: Path, endings: tuple[str, ...]) -> list[tuple[_Images, Path]]:
    """Pairs of a source and the folder its shards go to, which holds nothing but a conversion."""
    if not src.exists():
        raise DataError(f"{src} does not exist: SRC must be a folder of images or a file list")
    real_src, real_dst = (Path(os.path.realpath(path)) for path in (src, dst))  # `resolve` raises at a loop of links
    if real_dst == real_src or real_src in real_dst.parents:
        raise SettingsError(f"the shards would be written into the folder of the images, {src}: choose another")
    tars = {split: src / tar for split, tar in TARS.items() if (src / tar).is_file()}
    found = {split: _Images(path, split) for split, path in tars.items()}
    if src.is_dir():
        folders = find_splits(src, endings)
        folders.log_left_out(src, list(folders.taken))
        found |= {split: _Images(path, split) for split, path in folders.taken.items()}  # before a tar: may have labels
        found = found or {split: _Images(src, split) for split in splits_of_tars(src)}
    _refuse_others(dst, set(found) or None)
    pairs = [(found[split], dst / split) for split in SPLITS if split in found]
    return pairs or [(_Images(src, "train"), dst)]


def _refuse_others(dst: Path, splits: set[str] | None) -> None:
    """Refuse a DST with files that no conversion writes: they are neither mixed with shards nor deleted."""
    if dst.exists() and not dst.is_dir():
        raise SettingsError(f"{dst} exists and is not a folder: choose another destination")
    for entry in sorted(dst.iterdir()) if dst.exists() else []:
        if splits and entry.name in splits:
            _refuse_others(entry, None)
        elif splits or not _OURS.fullmatch(entry.name):
            raise SettingsError(f"{dst} holds something else already ({entry.name}): choose an empty folder")


def _convert_split(
    images: _Images,
    dst: Path,
    settings: ConvertSettings,
    workers: int,
    overwrite: bool,
    beton: BetonSettings | None,
    on_progress: Callable[[Progress], None],
) -> Manifest:
    source = _source(images, settings)
    made_from = _made_from(source, settings)
    with locked(dst):
        if overwrite:
            for path in dst.iterdir():
                path.unlink()
        alone = beton is not None and beton.alone
        if not (alone and (dst / MANIFEST).exists()):  # shards that are whole already may be meant to stay
            mark(dst, alone)
        if (dst / MANIFEST).exists():
            manifest = read_manifest(dst)
            _refuse_other_settings(dst, made_from, manifest.made_from)
            on_progress(Progress(dst, len(source), len(source), 0))
            remove_leftovers(dst, {shard.file for shard in manifest.shards}, done=True)
            return _with_beton(dst, manifest, beton, workers, on_progress)
        jobs = list(_jobs(source, dst, settings, made_from))
        kept = _finished_shards(dst, [job.path for job in jobs], made_from)
        remove_leftovers(dst, kept, done=False)
        _write_shards(jobs, kept, workers, dst, on_progress)
        manifest = finish(dst, [job.path for job in jobs], source.root, source.labels is not None, source.classes)
        return _with_beton(dst, manifest, beton, workers, on_progress)


def _with_beton(
    dst: Path,
    manifest: Manifest,
    beton: BetonSettings | None,
    workers: int,
    on_progress: Callable[[Progress], None],
) -> Manifest:
    return with_beton(dst, manifest, beton, workers, _counting(dst / BETON, 0, manifest.count, on_progress))


def _counting(what: Path, done: int, total: int, on_progress: Callable[[Progress], None]) -> Callable[[int, int], None]:
    """A function of (images done, bytes read) since its last call that reports the progress of `what`."""
    read = 0

    def advance(images: int, size: int) -> None:
        nonlocal done, read
        done, read = done + images, read + size
        on_progress(Progress(what, done, total, read))

    return advance


def _convert_part(
    images: _Images,
    dst: Path,
    settings: ConvertSettings,
    part: Part,
    splits: list[str],
    workers: int,
    on_progress: Callable[[Progress], None],
) -> PartManifest:
    source = _source(images, settings)
    made_from = _made_from(source, settings)
    jobs = part.share(list(_jobs(source, dst, settings, made_from)))
    paths = [job.path for job in jobs]
    labelled, shards = source.labels is not None, [path.name for path in paths]
    written = PartManifest(part.number, part.of, splits, str(source.root), labelled, source.classes, made_from, shards)
    if (dst / MANIFEST).exists():  # merged already: nothing to write, no lock to leave
        _refuse_other_settings(dst, made_from, read_manifest(dst).made_from)
        count = sum(len(job.numbers) for job in jobs)
        on_progress(Progress(dst, count, count, 0))
        return written
    with locked(dst, part.name):
        kept = _finished_shards(dst, paths, made_from)
        for path in paths:  # the shards of other parts are not touched
            _remove_shard(path, *([PARTIAL] if path.name in kept else ["", PARTIAL]))
        _write_shards(jobs, kept, workers, dst, on_progress)
        write_part(dst, written)
        return written


def _source(images: _Images, settings: ConvertSettings) -> FileSource:
    source = settings.images.samples(images_to_convert(images.path, images.split, settings.images.endings))
    if source.labels is None:
        logger.warning(
            "%s has no class names, so its images are converted without labels. Pre-training needs none. For labels,"
            " unpack it, and convert class folders, or a file list of lines `path label` next to the images.",
            images.path,
        )
    return source


def _made_from(source: FileSource, settings: ConvertSettings) -> dict[str, object]:
    given = asdict(settings)
    if settings.images.max_pixels == MAX_PIXELS:
        del given["images"]["max_pixels"]  # as in what was converted before there was a choice
    return {"format": FORMAT, **given, "count": len(source), "listing": source.fingerprint()}


def _jobs(source: FileSource, dst: Path, settings: ConvertSettings, made_from: dict[str, object]) -> Iterator[ShardJob]:
    permutation = order(len(source), settings.seed, epoch=0)
    size = settings.shard_size(len(source))
    for shard, start in enumerate(range(0, len(source), size)):
        numbers = permutation[start : start + size]
        yield ShardJob(dst / shard_name(shard), source.subset(numbers), numbers, settings.images, made_from)


def _refuse_other_settings(dst: Path, asked: dict[str, object], found: dict[str, object]) -> None:
    differences = [f"{key}: {found.get(key)} -> {asked[key]}" for key in asked if asked[key] != found.get(key)]
    if differences:
        raise SettingsError(
            f"{dst} was converted from other data or with other settings ({'; '.join(differences)}):"
            " choose another folder, or --overwrite"
        )


def _finished_shards(dst: Path, paths: Iterable[Path], made_from: dict[str, object]) -> set[str]:
    """File names of those of these shards that an earlier run finished and that are undamaged."""
    kept = set()
    for path in filter(Path.exists, (path.with_suffix(".json") for path in paths)):
        try:
            report = json.loads(path.read_bytes())
            _refuse_other_settings(dst, made_from, report["made_from"])
            shard = ShardFile(**report["shard"])
            if path.with_suffix(".idx").exists() and file_sha256(dst / shard.file) == shard.sha256:
                kept.add(shard.file)
        except (OSError, ValueError, KeyError, TypeError) as error:  # noqa: PERF203
            logger.warning("%s is damaged (%s): its shard will be written again", path, error)
    return kept


def remove_leftovers(dst: Path, kept: set[str], done: bool) -> None:
    """Delete what an interrupted run left behind, except whole shards."""
    for path in dst.iterdir():
        unfinished = path.name.startswith("shard-") and path.with_suffix(".tar").name not in kept
        report = done and path.suffix in (".json", ".lock") and path.name != MANIFEST
        if unfinished or report or path.name.endswith(PARTIAL) or (path.name == INDEX_FILE and not done):
            path.unlink()


def _write_shards(
    jobs: list[ShardJob], kept: set[str], workers: int, dst: Path, on_progress: Callable[[Progress], None]
) -> None:
    total = sum(len(job.numbers) for job in jobs)
    done = sum(len(job.numbers) for job in jobs if job.path.name in kept)
    advance = _counting(dst, done, total, on_progress)
    todo = [job for job in jobs if job.path.name not in kept]
    advance(0, 0)
    try:
        run_jobs(write_job, todo, max(min(workers, len(todo)), 1), advance, ShardJob.describe)
    finally:
        for job in todo:  # of processes that were stopped
            _remove_shard(job.path, PARTIAL)


def _remove_shard(path: Path, *endings: str) -> None:
    """Delete what there is of a shard, its .idx and its report: "" the files themselves, PARTIAL unfinished ones."""
    for suffix in (".json", ".idx", ".tar"):  # the report first: without it the rest does not count
        for ending in endings:
            path.with_suffix(suffix + ending).unlink(missing_ok=True)


def finish(dst: Path, paths: list[Path], root: Path | str, labelled: bool, classes: list[str]) -> Manifest:
    """Index and manifest of `dst` from the reports of all shards; `root` is where the images came from.

    Raises DataError when not one image is readable, OSError when writing fails.
    """
    reports = [json.loads(path.with_suffix(".json").read_bytes()) for path in paths]
    full = [report for report in reports if report["records"]]  # a shard all of whose images were refused is none
    if not full:
        count, first = reports[0]["made_from"]["count"], reports[0]["refused"][0]
        raise DataError(
            f"none of the {count} images of {root} is readable; the first: {first['name']}: {first['reason']}"
        )
    losses = _losses(reports)
    for kind in losses:
        logger.warning("%s: %s", root, kind.told(f"{reports[0]['made_from']['count']} images"))
    manifest = Manifest(
        count=sum(len(report["records"]) for report in full),
        labelled=labelled,
        classes=classes,
        made_from=reports[0]["made_from"],
        index=write_index(dst / INDEX_FILE, [[Record(*r) for r in report["records"]] for report in full]),
        shards=[ShardFile(**report["shard"]) for report in full],
        repaired=sorted((entry for report in reports for entry in report["repaired"]), key=lambda e: e["name"]),
        refused=sorted((entry for report in reports for entry in report["refused"]), key=lambda e: e["name"]),
        losses=[kind._asdict() for kind in losses],
        statistics=statistics_by_scale([report.get("measured") or {} for report in full]),
    )
    write_manifest(dst, manifest)
    remove_leftovers(dst, {shard.file for shard in manifest.shards}, done=True)
    return manifest


def _losses(reports: list[dict]) -> list[LossCount]:
    """What the images of all shards lost."""
    losses: Counter[Loss] = Counter()
    for report in reports:
        for *loss, count in report.get("losses", []):  # versions before left none
            losses[Loss(*loss)] += count
    return counted(losses)
