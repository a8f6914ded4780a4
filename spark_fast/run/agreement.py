"""Ranks with other settings or other images would not do one run: they are refused before the first step."""

from __future__ import annotations

from collections.abc import Mapping

from spark_fast.errors import DataError, SettingsError, SparkFastError
from spark_fast.pipelines import Pipeline
from spark_fast.run.config import Tree
from spark_fast.run.distributed import Ranks

OF_THE_HOST = {  # settings that may differ between hosts
    *("data_path", "val_path", "cache_dir", "cache_size", "workers", "worker_processes", "prefetch"),
    *("exp_dir", "weights", "init_weight", "device", "threads"),
}


def check_settings(ranks: Ranks, settings: Tree) -> None:
    """Raise SettingsError on every rank if one of them has other settings than the first."""
    groups = settings.to_dict().values()
    mine = {f"--{name}": value for group in groups for name, value in group.items() if name not in OF_THE_HOST}
    _check(ranks, mine, SettingsError)


def check_images(ranks: Ranks, pipeline: Pipeline, path: str) -> None:
    """Raise DataError on every rank if one of them has other images than the first; `path`: where this rank's are."""
    found = {f"{path}, number of images": pipeline.num_samples, f"{path}, hash of names and labels": pipeline.listing}
    _check(ranks, found, DataError)


def _check(ranks: Ranks, mine: Mapping[str, object], refuse: type[SparkFastError]) -> None:
    if ranks.world_size == 1:
        return
    first, *others = ranks.gather(list(mine.items()))  # all ranks judge the same list, so all of them end
    for rank, theirs in enumerate(others, 1):
        for (name, value), (other_name, other) in zip(first, theirs, strict=True):
            if value != other:
                raise refuse(
                    f"rank 0 has {name}: {value!r}, rank {rank} has {other_name}: {other!r}. All ranks must do the "
                    f"same run on the same images"
                )
