from __future__ import annotations

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.listing.class_labels import MOST_CLASSES, class_numbers


def numbers(*texts: str):
    labels, classes = class_numbers([text.encode() for text in texts], lambda i: f"place {i}")
    return labels.tolist(), classes


def test_numbers_are_themselves_and_names_are_numbered_in_sorted_order(caplog):
    assert numbers("3", "007", "0", "+2", "-0") == ([3, 7, 0, 2, 0], [])
    with caplog.at_level("INFO", "spark_fast.pipelines"):
        assert numbers("dog", "cat", "Zebra", "dog") == ([2, 1, 0, 2], ["Zebra", "cat", "dog"])
    assert "labels are names: 3 classes, numbered in sorted order from 'Zebra' = 0" in caplog.text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["0", "-1"], "place 1: label '-1' is negative"),
        (["2000000000"], f"place 0: label '2000000000' is too large .* the limit is {MOST_CLASSES - 1}"),
        (["0", "9" * 6000], "place 1: label '9+' is too large"),
        (["0", "cat"], "place 1: label 'cat' is not a number, unlike those before it"),
        (["cat", "0"], "place 1: label '0' is a number, unlike those before it"),
        (["0", "1.0"], "place 1: label '1.0' is not a whole number"),
        (["1e3"], "place 0: label '1e3' is not a whole number"),
        (["cat", ""], "place 1: label '' is missing"),
    ],
)
def test_what_is_no_class_is_refused_with_its_place(texts, message):
    with pytest.raises(DataError, match=message):
        numbers(*texts)


def test_the_largest_label_is_read():
    assert numbers(str(MOST_CLASSES - 1)) == ([MOST_CLASSES - 1], [])
