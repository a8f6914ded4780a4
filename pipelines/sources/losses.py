"""How many images lose what when they become RGB of 8 bits, and the one warning that says so.

What an image loses is `transforms.pillow_pixels.Loss`. Training counts it in a pipeline's first epoch, a conversion in
all it converts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from spark_fast.pipelines.transforms.file_kinds import PAGE
from spark_fast.pipelines.transforms.pillow_pixels import DARK, Loss


class LossCount(NamedTuple):
    """Images of one kind, and how many of them are dark; see `Loss`."""

    kind: str
    lost: str
    remedy: str
    images: int
    dark: int

    def told(self, of: str) -> str:
        """The warning; `of`: all the images that were looked at, "200 images"."""
        dark = f", {self.dark} of them are darker than level {DARK} of 255" if self.dark else ""
        return f"{self.images} of {of} are {self.kind}; {self.lost}{dark}: {self.remedy}, see {PAGE}"


def counted(losses: Iterable[Loss] | Mapping[Loss, int]) -> list[LossCount]:
    """One count a kind, the most frequent kind first, of the losses of many images."""
    images: Counter[tuple[str, str, str]] = Counter()
    dark: Counter[tuple[str, str, str]] = Counter()
    for loss, count in Counter(losses).items():
        images[loss[:3]] += count
        dark[loss[:3]] += count * loss.dark
    return [LossCount(*kind, count, dark[kind]) for kind, count in images.most_common()]
