"""The images that `learning.py` learns from and judges by: all as the converter stored them, and lists of some."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np

from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert

WATCHED = 10  # images a class that a run in progress is judged by; nothing is chosen by them
HELD_OUT = 200  # images a class, at most a fifth, that rates of fine-tuning are tuned by and that it never learns from
TUNING = 1000  # images a class, at most, for the k-NN that rates of pre-training are tuned by


class Images:
    """The data set: its files as they came, and as the converter stored them.

    Args:
        source: a tar, or a folder, with train/ and test/ (or val/) of class folders.
        out: where a tar is unpacked, and the shards go.
        channels: of the images; 3: photographs.
    """

    def __init__(self, source: Path, out: Path, channels: int = 3) -> None:
        self.root = source if source.is_dir() else _unpacked(source, out / "images")
        self.shards = out / "shards"
        kept = ConvertSettings() if channels == 3 else ConvertSettings(BandRecords(in_chans=channels))
        convert(self.root, self.shards, kept, workers=len(os.sched_getaffinity(0)))
        self.test = next(self.shards / split for split in ("test", "val") if (self.shards / split).is_dir())
        self.knn = out / "knn"  # see `link_neighbours`
        folders = sorted(path for path in (self.root / "train").iterdir() if path.is_dir())
        mixed = np.random.default_rng(0)
        self._classes = [mixed.permutation(sorted(f.iterdir())).tolist() for f in folders]

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def labelled(self, share: float, seed: int, held_out: bool) -> Path:
        """Training images with labels, equally many of each class: shards of all, or a list of a share of them."""
        if share == 1 and not held_out:
            return self.shards / "train"
        random = np.random.default_rng(seed)
        free = [images[self._kept(images) :] for images in self._classes] if held_out else self._classes
        chosen = [
            random.permutation(c)[: round(share * len(all_))] for c, all_ in zip(free, self._classes, strict=True)
        ]
        return self._list(f"labelled-{share:g}-{seed}{'-free' if held_out else ''}", chosen)

    def some(self, share: float) -> Path:
        """A share of the training images to pre-train on."""
        return self.shards if share == 1 else self.labelled(share, 0, False)

    def watched(self) -> Path:
        """A list of a few training images."""
        return self._list("watched", [images[:WATCHED] for images in self._classes])

    def held_out(self) -> Path:
        """A list of the training images that the sweep is judged by."""
        return self._list("held-out", [images[: self._kept(images)] for images in self._classes])

    def tuning(self) -> Path:
        """A list of training images for the k-NN that rates of pre-training are tuned by."""
        return self._list("tuning", [images[:TUNING] for images in self._classes])

    def link_neighbours(self, share: float) -> None:
        """Make the folder `knn`: train/ has links to a share of the training images, val/ leads to all test images."""
        if self.knn.exists():
            return
        made = self.knn.with_suffix(".partial")
        shutil.rmtree(made, ignore_errors=True)
        for images in self._classes:
            for image in map(Path, images[: round(share * len(images))]):
                link = made / "train" / image.parent.name / image.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(image.absolute())
        (made / "val").symlink_to(self.test.absolute())
        made.replace(self.knn)

    @staticmethod
    def _kept(images: list) -> int:
        return min(HELD_OUT, len(images) // 5)

    def _list(self, name: str, classes: list) -> Path:
        lines = [f"{Path(p).relative_to(self.root)} {label}\n" for label, paths in enumerate(classes) for p in paths]
        path = self.root / f"{name}.txt"  # a list stands at the top of its images' folder
        written = path.with_suffix(f".{os.getpid()}")  # another process may be reading the list
        written.write_text("".join(lines), encoding="utf-8")
        written.replace(path)
        return path


def _unpacked(tar: Path, folder: Path) -> Path:
    done = folder / "unpacked"
    if not done.exists():
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
        done.touch()
    return next(path.parent for path in sorted(folder.glob("**/train")))
