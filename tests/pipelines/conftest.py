from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spark_fast.pipelines.convert.beton_writer import BetonSettings
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from tests.pipelines.pictures import jpeg


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an ImageNet-layout folder: train/<class>/<number>.JPEG, sizes and contents by number."""

    def make(count: int = 24, classes: int = 3, name: str = "images") -> Path:
        root = tmp_path / name
        for i in range(count):
            folder = root / "train" / f"n{i * classes // count:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:04d}.JPEG").write_bytes(jpeg(i, 50 + i % 7, 60 + i % 11))
        return root

    return make


@pytest.fixture
def beton_folder(image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Converts such a folder to shards and a .beton, half of its records raw unless said otherwise."""

    def make(root: Path | None = None, raw: float = 0.5, name: str = "converted", **settings: object) -> Path:
        keep_size = ConvertSettings(Reencode(short_side=0), images_per_shard=10)
        convert(root or image_folder(), tmp_path / name, keep_size, beton=BetonSettings(raw, **settings))
        return tmp_path / name / "train"

    return make


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    data = Path(os.environ.get("SPARK_FAST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (data / "imagenet_sample").is_dir():
        pytest.skip(f"no real images: {data / 'imagenet_sample'} is missing (set SPARK_FAST_DATA)")
    return data / "imagenet_sample"
