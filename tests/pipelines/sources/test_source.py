from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources import source
from spark_fast.pipelines.sources.source import (
    RETRY_SECONDS,
    empty_classes,
    naming_image,
    num_classes,
    read_patiently,
)


class Stumbling:
    """Storage that fails so many times before it reads."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def read(self, i: int) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(5, f"Input/output error, {self.failures} to go")
        return b"image %d" % i


def test_stumbling_storage_is_asked_again_after_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(source, "time", SimpleNamespace(sleep=pauses.append))
    assert read_patiently(Stumbling(2), 7) == b"image 7"
    assert pauses == list(RETRY_SECONDS)
    with pytest.raises(OSError, match="0 to go"):
        read_patiently(Stumbling(3), 7)


@pytest.mark.parametrize(
    ("labels", "classes", "count"), [(None, [], 0), ([0, 4, 2], [], 5), ([0, 1], ["a", "b", "empty"], 3)]
)
def test_classes_are_counted_by_their_names_or_else_by_the_highest_label(labels, classes, count):
    labels = None if labels is None else np.array(labels, np.int32)
    assert num_classes(SimpleNamespace(labels=labels, classes=classes)) == count


@pytest.mark.parametrize(
    ("labels", "classes", "empty"),
    [(None, [], set()), ([0, 4], [], set()), ([0, 2], ["a", "b", "c", "d"], {"b", "d"})],
)
def test_classes_without_an_image_are_known(labels, classes, empty):
    labels = None if labels is None else np.array(labels, np.int32)
    assert empty_classes(SimpleNamespace(labels=labels, classes=classes)) == empty


def test_what_fails_unexpectedly_names_the_image_and_a_data_error_stays_as_it_is():
    named = SimpleNamespace(name=lambda i: f"image{i}.jpg")
    message = r"while loading image 3 \(image3.jpg\): ZeroDivisionError"
    with pytest.raises(RuntimeError, match=message) as caught, naming_image(named, 3):
        _ = 1 / 0
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(DataError, match=r"^all is lost$"), naming_image(named, 3):
        raise DataError("all is lost")
