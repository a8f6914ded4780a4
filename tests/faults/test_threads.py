"""A decoding thread that raises, or that would wait for ever (fault 23): all backends decode in threads."""

from __future__ import annotations

import os
import threading
import traceback
from pathlib import Path

import pytest

from spark_fast.pipelines.backends.ffcv import FfcvPipeline
from tests.pipelines.building import build
from tests.pipelines.sources.test_beton import flip

backends = pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("dali", marks=pytest.mark.dali), pytest.param("ffcv", marks=pytest.mark.ffcv)],
)


@backends
def test_an_unexpected_failure_reaches_the_consumer_with_its_traceback_and_the_image(
    image_folder, request, times, backend
):
    path = image_folder()
    if backend == "ffcv":
        path = request.getfixturevalue("beton_folder")(path, raw=0)
    threads = set(threading.enumerate())
    for k in range(times(1, 5)):
        bad = 7 + 3 * k  # none stands in for another
        pipeline = build(path, pipeline=backend, batch_size=6, input_size=32, max_bad_fraction=1.0)
        if isinstance(pipeline, FfcvPipeline):  # its kernel hands over what it cannot show
            source = pipeline._beton
            flip(source.path, int(source.checks["ptr"][bad]) + 50)
        read = pipeline._source.read  # type: ignore[attr-defined]

        def failing(i: int, read=read, bad: int = bad) -> bytes:
            return read(i) if i != bad else 1 / 0  # type: ignore[return-value]

        pipeline._source.read = failing  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match=rf"while loading image {bad} \(.*\): ZeroDivisionError") as caught:
            list(pipeline.epoch(0))
        assert "in failing" in "".join(traceback.format_exception(caught.value))
        pipeline.close()
        assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("backend", ["torch", pytest.param("dali", marks=pytest.mark.dali)])
def test_what_would_block_a_thread_for_ever_is_replaced_and_named(image_folder, backend):
    root = image_folder()
    pipe: Path = next((root / "train" / "n0000").iterdir())
    pipe.unlink()
    os.mkfifo(pipe)
    pipeline = build(root, pipeline=backend, batch_size=24, input_size=32, max_bad_fraction=1.0)
    list(pipeline.epoch(0))
    pipeline.close()
    assert pipeline.bad_images.substituted == 1
    assert "not a regular file" in pipeline.bad_images.first_substituted[0]
