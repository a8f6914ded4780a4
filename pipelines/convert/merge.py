"""Join the parts that several machines converted: the same index and manifest as from one machine.

The shards are there already; only their reports are read, so this takes seconds. Stopped, it can be run again.
"""

from __future__ import annotations

import json
from pathlib import Path

from spark_fast.errors import DataError
from spark_fast.pipelines.convert.conversion import finish, remove_leftovers
from spark_fast.pipelines.convert.conversion_parts import PartManifest, read_parts
from spark_fast.pipelines.convert.output_dir import locked, storage
from spark_fast.pipelines.sources.listing.splits import SPLITS
from spark_fast.pipelines.sources.shard_format import MANIFEST, Manifest, read_manifest, shard_name


def merge(dst: Path) -> list[tuple[Path, Manifest]]:
    """Write the manifests of DST, to which all parts' files were written or copied; merged already, check that.

    Returns the folders and their manifests. Raises DataError when a part or file is missing, or parts do not belong
    together; then nothing is written. StorageError when writing fails.
    """
    folders = [dst / split for split in SPLITS if (dst / split).is_dir()] or [dst]
    if not dst.is_dir():
        raise DataError(f"{dst} is not a folder: give the folder of the parts")
    with storage(dst):
        parts = {folder: read_parts(folder) for folder in folders if not (folder / MANIFEST).exists()}
        for folder, found in parts.items():
            _check_splits(dst, folder, found[0].splits)
            _check_shards(folder, found)
        return [(folder, _merge_split(folder, parts.get(folder))) for folder in folders]


def _check_splits(dst: Path, folder: Path, splits: list[str]) -> None:
    if missing := [split for split in splits if not (dst / split).is_dir()]:
        raise DataError(f"{folder} was converted together with {', '.join(missing)}, but {dst} has no part of these")


def _check_shards(folder: Path, parts: list[PartManifest]) -> None:
    """Every shard is there, whole by its size, and made with the settings of its part."""
    for part in parts:
        for name in part.shards:
            path = folder / name
            try:
                report = json.loads(path.with_suffix(".json").read_bytes())
                found = path.stat().st_size if path.with_suffix(".idx").exists() else -1
                fits = report["made_from"] == part.made_from and report["shard"]["bytes"] == found
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} of part {part.part} is missing or damaged ({error}): copy it again") from error
            if not fits:
                raise DataError(
                    f"{path} is not from part {part.part}, or it is incomplete: copy its .tar, .idx and .json again, or"
                    " run the part again"
                )


def _merge_split(folder: Path, parts: list[PartManifest] | None) -> Manifest:
    with locked(folder):
        if parts is None:
            manifest = read_manifest(folder)
            remove_leftovers(folder, {shard.file for shard in manifest.shards}, done=True)
            return manifest
        shards = sorted(name for part in parts for name in part.shards)
        if shards != [shard_name(i) for i in range(len(shards))]:
            raise DataError(
                f"the parts in {folder} do not fit together: they list {len(shards)} shards, whose numbers have gaps"
            )
        return finish(folder, [folder / name for name in shards], parts[0].root, parts[0].labelled, parts[0].classes)
