"""The settings of loading, which pre-training and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass
class Loading:
    """How the images are read and decoded."""

    workers: Annotated[int, arg(aliases=["--dataloader_workers"])] = 8
    """decoding threads per rank"""
    worker_processes: int | Literal["auto"] = "auto"
    """processes for the decoding threads; 0: the command's own process; auto: one per thread, at most 16, and 0 for up
    to 2 threads (for 1 if the images are TIFF or DICOM files)"""
    prefetch: int = 2
    """batches decoded ahead"""
    shuffle_block: int = 0
    """number of shards whose images are shuffled together, for shards on a server (docs/how_to/remote.md); 0: all"""
    cache_dir: str = ""
    """local cache for shards on a server; default: spark_fast/shards in $XDG_CACHE_HOME or ~/.cache"""
    cache_size: str = "50GB"
    """largest size of the cache, e.g. 500MB, 1.5TB, 200GiB; the least recently used shards are removed"""
    max_bad_fraction: float = 0.01
    """stop if more than this share of the images is unreadable (checked after 1000 images)"""
    max_pixels: int = 64
    """largest image in million (2**20) pixels; larger ones count as unreadable, because they may fill the memory"""
