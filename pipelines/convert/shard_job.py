"""The unit of conversion: write one shard, and a report without which the shard does not count.

Runs in a process of its own and takes all it needs with it, so jobs are small and can be pickled.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError, ImageError
from spark_fast.files import atomic_write
from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.process_pool import Advance
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.stored_statistics import Tally
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.shard_format import write_shard
from spark_fast.pipelines.sources.source import read_patiently
from spark_fast.pipelines.transforms.pillow_pixels import Loss


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    path: Path
    source: FileSource  # its images alone, in the order of the shard
    numbers: NDArray[np.int64]  # theirs in the whole listing
    images: Reencode | BandRecords
    made_from: dict[str, object]

    def describe(self, done: int) -> str:
        """Which image is next when `done` are."""
        where = f"image {self.source.name(done)}" if done < len(self.numbers) else "its end"
        return f"{self.path}, {where}"


def write_job(job: ShardJob, advance: Advance) -> None:
    """Write a shard, its .idx, and last its report, a .json."""
    repaired: list[dict[str, str]] = []
    refused: list[dict[str, str]] = []
    losses: Counter[Loss] = Counter()
    tally = Tally()

    def samples() -> Iterator[tuple[int, str, int, bytes]]:
        for i, number in enumerate(job.numbers.tolist()):
            name = job.source.name(i)
            data: bytes | memoryview = b""
            try:
                data = read_patiently(job.source, i)
                content, repair, lost, pixels = job.images.reencoded(data)
            except (ImageError, OSError) as error:
                _check_source_is_there(job.source.root)
                refused.append({"name": name, "reason": str(error)})
            else:
                losses.update(lost)
                if repair or lost:
                    reasons = [*([repair] if repair else []), *(f"{loss.kind}; {loss.lost}" for loss in lost)]
                    repaired.append({"name": name, "reason": ": ".join(reasons)})
                label = -1 if job.source.labels is None else int(job.source.labels[i])
                if pixels is not None:
                    tally.add(pixels)
                yield number, name, label, content
            advance(1, len(data))

    shard, records = write_shard(job.path, samples(), job.images.suffix)
    report = {
        "made_from": job.made_from,
        "shard": asdict(shard),
        "records": records,
        "repaired": repaired,
        "refused": refused,
        "losses": [[*loss, count] for loss, count in losses.items()],
        "measured": tally.report(),
    }
    with atomic_write(job.path.with_suffix(".json")) as file:
        file.write(json.dumps(report).encode())


def _check_source_is_there(root: Path) -> None:
    """Raise DataError when the source is unmounted, instead of refusing a million images as unreadable."""
    try:
        os.close(os.open(root, os.O_RDONLY))  # a folder, or a tar
    except OSError as error:
        raise DataError(
            f"{root} is gone ({error}). Finished shards are kept: make it available and run the same command again."
        ) from error
