"""Mutated images: no decoder's exception gets out, and JPEGs are judged as libjpeg's own command judges them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.jpeg import _without_fast_route
from tests.faults.image_mutations import JPEGS, OTHERS, as_pillow, mutated
from tests.pipelines.djpeg import exit_code, run

few_and_many = pytest.mark.parametrize(
    "times", [1, pytest.param(8, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.drill)]
)
HARMLESS = ("unknown JFIF revision", "Invalid SOS parameters", "extraneous bytes before marker 0xd9")


def pixels(data: bytes) -> np.ndarray | None:
    """None where the image is refused; anything but ImageError fails the test."""
    try:
        return decode_image(data).pixels
    except ImageError:
        return None


@pytest.mark.djpeg
@few_and_many
def test_a_jpeg_is_taken_if_djpeg_takes_it_and_then_shows_pillows_pixels(times):
    counts, rng = Counter(), random.Random(1)
    for name, data in [*JPEGS.items()] * times:
        damaged = mutated(data, rng)
        shown, (code, message) = pixels(damaged), run(damaged)
        counts[code, shown is not None] += 1
        if shown is None:
            # djpeg overlooks bad codes where it takes libjpeg's fast route, and so does not without that
            assert code or exit_code(bytes(_without_fast_route(damaged))), name
        else:
            assert not code or message.endswith(HARMLESS) or any(words in message for words in HARMLESS), (
                name,
                message,
            )
            assert np.array_equal(shown, as_pillow(damaged)), name
    print({f"djpeg {code}, {'taken' if taken else 'refused'}": n for (code, taken), n in sorted(counts.items())})
    assert counts[2, True] <= 0.01 * counts.total() + 1  # djpeg warns, of something that spares the pixels
    assert min(counts[0, True], counts[2, False]) > 0.1 * counts.total()


@few_and_many
def test_other_formats_are_taken_as_pillow_shows_them_or_refused(times):
    counts, rng = Counter(), random.Random(2)
    for name, data in [*OTHERS.items()] * times:
        damaged = mutated(data, rng)
        shown, expected = pixels(damaged), as_pillow(damaged)
        counts[shown is not None] += 1
        if shown is not None and expected is not None:  # Pillow refuses a PNG for its text
            assert np.array_equal(shown, expected), name
    print(counts)
    assert min(counts.values()) > 0.1 * counts.total()
