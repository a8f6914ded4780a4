from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    data = Path(os.environ.get("SPARK_FAST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (data / "imagenet_sample").is_dir():
        pytest.skip(f"no real images: {data / 'imagenet_sample'} is missing (set SPARK_FAST_DATA)")
    return data / "imagenet_sample"
