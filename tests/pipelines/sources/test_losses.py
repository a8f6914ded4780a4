"""Losses of many images become one warning a kind."""

from __future__ import annotations

from spark_fast.pipelines.sources.losses import counted
from spark_fast.pipelines.transforms.pillow_pixels import Loss

DEEP = Loss("16-bit grey (I;16)", "only their upper 8 bits are read", "rescale them first")
BAND = Loss("RGB with a fourth band (RGBA)", "it is dropped as transparency", "choose three bands first")


def test_the_warning_names_kind_count_what_is_lost_and_how_many_are_dark():
    deep, band = counted([BAND, *[DEEP] * 23, *[DEEP._replace(dark=True)] * 14, BAND])
    assert deep.told("200 images") == (
        "37 of 200 images are 16-bit grey (I;16); only their upper 8 bits are read, 14 of them are darker than level 16"
        " of 255: rescale them first, see docs/how_to/your_own_data.md"
    )
    assert band.told("the 200 images read so far") == (
        "2 of the 200 images read so far are RGB with a fourth band (RGBA); it is dropped as transparency: choose three"
        " bands first, see docs/how_to/your_own_data.md"
    )
    assert counted([]) == []
