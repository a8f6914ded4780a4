"""Tiles of large scenes as images of their own, each read by its window: no scene is ever in memory as a whole.

Tiles begin at the top left corner and every `stride` pixels from there, as long as they end inside the scene. The last
of a row or column ends at the edge; it may overlap the one before. Where a scene is smaller than a tile, the tile is as
small as the scene. A tile has its scene's label, and the name of the scene with the tile's top left corner:
`berlin-y512-x1024.tif`.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError, SettingsError
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.transforms.bands.arrays import npy_of
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.scenes import Window, open_scene


@dataclass(frozen=True)
class Tiling:
    """Side of the tiles, and the distance between the beginnings of two neighbours, in pixels."""

    tile: int
    stride: int

    def __post_init__(self) -> None:
        if self.tile < 1 or self.stride < 1:
            raise SettingsError(f"tile and stride must be 1 pixel or more, got {self.tile} and {self.stride}")

    def windows(self, height: int, width: int) -> list[Window]:
        """The tiles of a scene, row by row."""
        return [
            Window(top, left, min(self.tile, height), min(self.tile, width))
            for top in self._starts(height)
            for left in self._starts(width)
        ]

    def _starts(self, side: int) -> list[int]:
        last = max(side - self.tile, 0)
        return [*range(0, last, self.stride), last]


class TileSource(FileSource):
    """Tiles of scenes: `windows`, (n, 5) int64, is the scene's number and the window; height 0: an unreadable scene."""

    def __init__(self, scenes: FileSource, windows: NDArray[np.int64], expected: Expected) -> None:
        names = [_name(scenes.path(int(scene)), Window(*window)) for scene, *window in windows.tolist()]
        labels = None if scenes.labels is None else scenes.labels[windows[:, 0]]
        super().__init__(scenes.root, names, labels, scenes.classes)
        self._scenes, self._windows, self._expected = scenes, windows, expected

    @classmethod
    def of(cls, scenes: FileSource, tiling: Tiling, expected: Expected) -> TileSource:
        """All tiles of all scenes. A scene that cannot be read is listed as one image, whose reading says why.

        Raises SettingsError for scenes that are no files of their own.
        """
        if type(scenes) is not FileSource:
            raise SettingsError(f"--tile reads windows of files, not of tars: unpack {scenes.root} first")
        rows = []
        for number in range(len(scenes)):
            try:
                with open_scene(_path(scenes, number), expected) as scene:
                    windows = tiling.windows(scene.height, scene.width)
            except (ImageError, OSError):
                windows = [Window(0, 0, 0, 0)]
            rows += [(number, *window) for window in windows]
        return cls(scenes, np.array(rows, np.int64), expected)

    def read(self, i: int) -> bytes:
        """The tile as a .npy file, (H, W, channels). Raises ImageError or OSError, also for an unreadable scene."""
        number, *window = self._windows[i].tolist()
        with open_scene(_path(self._scenes, number), self._expected) as scene:
            if not window[2]:
                raise ImageError("it has changed since the scenes were listed, when it could not be read")
            return npy_of(scene.read(Window(*window)))

    def subset(self, ids: NDArray[np.int64]) -> TileSource:
        """The samples `ids`, (m,), renumbered from 0."""
        windows = self._windows[ids]
        kept, windows[:, 0] = np.unique(windows[:, 0], return_inverse=True)
        return TileSource(self._scenes.subset(kept), windows, self._expected)


def _path(scenes: FileSource, number: int) -> Path:
    return Path(os.fsdecode(os.fsencode(scenes.root) + b"/" + scenes.path(number)))


def _name(scene: bytes, window: Window) -> bytes:
    if not window.height:
        return scene
    stem, suffix = posixpath.splitext(scene)
    return b"%s-y%d-x%d%s" % (stem, window.top, window.left, suffix)
