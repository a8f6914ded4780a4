"""Small pictures of four classes, and the command run inside this process."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spark_fast.cli.eval import main
from tests.commands import as_it_was

CLASSES = ("blue", "green", "grey", "red")
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 70), "grey": (128, 128, 128), "red": (200, 50, 40)}


def write_pictures(root: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for i in range(count):
        name = CLASSES[i % len(CLASSES)]
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        noise = rng.normal(0, 30, (6, 7, 3))
        small = (np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(small).resize((56, 48)).save(place / f"{i:03d}.JPEG", quality=90)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """48 to learn from, 13 to judge by."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train", 48, 0)
    write_pictures(folder / "val", 13, 1)
    return folder


TINY = ["--model=resnet10t", "--input_size=32", "--bs=16", "--workers=1", "--threads=1"]


@pytest.fixture
def run(pictures):
    """The exit code of `spark-fast-eval`, with this process's streams, handlers and threads as they were afterwards."""

    def command(mode: str, *words: object) -> int:
        given = [*TINY, f"--data_path={pictures}", *map(str, words)]
        with as_it_was():
            logging.getLogger().handlers = [logging.StreamHandler(sys.stderr)]
            return main([mode, *given] if mode else list(map(str, words)))

    return command
