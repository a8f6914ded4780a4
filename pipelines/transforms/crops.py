"""Where an image is cropped and how it is flipped and turned: SparK's augmentation, and more, as pure arithmetic.

The semantics are torchvision's `RandomResizedCrop.get_params` and `RandomHorizontalFlip`
(torchvision/transforms/transforms.py), with the random numbers handed in: the crop of a sample is a
function of (seed, epoch, sample, image size). One image costs about 2 us of plain Python, less
than NumPy's first call on so few numbers needs, and all backends share one implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

ATTEMPTS = 10  # torchvision's number, before it falls back to a central crop
DRAWS = 2 * ATTEMPTS + 3  # (area, aspect) of every attempt, then top, left, flip
ALL_DRAWS = DRAWS + 2  # then what not every backend can do: upside down, quarter turns


class Turn(IntFlag):
    """How a crop is turned before it is an input: transposed first, then flipped either way. True is MIRRORED."""

    MIRRORED = 1  # left and right change places
    UPSIDE_DOWN = 2  # top and bottom do
    TRANSPOSED = 4  # rows become columns


_QUARTERS = (  # numpy.rot90 of 0 to 3 times
    Turn(0),
    Turn.TRANSPOSED | Turn.UPSIDE_DOWN,
    Turn.MIRRORED | Turn.UPSIDE_DOWN,
    Turn.TRANSPOSED | Turn.MIRRORED,
)


class Box(NamedTuple):
    """A rectangle of whole pixels inside an image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Augmentation:
    """How a decoded image becomes an input. `random=False`: central crop, no flip (pictures, evaluation)."""

    input_size: tuple[int, int] = (224, 224)  # height, width
    scale: tuple[float, float] = (0.67, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn uniformly in its logarithm
    flip: bool = True  # with probability 1/2
    vflip: bool = False  # upside down, with probability 1/2
    rot90: bool = False  # by 0 to 3 quarter turns, before any flip
    random: bool = True
    centre: float = 1.0  # side of the central crop, of the largest one's; timm's crop_pct

    def box(self, draws: Sequence[float], height: int, width: int) -> Box:
        """The crop of an image of this size, given the sample's DRAWS numbers in [0, 1)."""
        if not self.random:
            return centre_box(height, width, self.input_size, self.centre)
        return random_box(draws, height, width, self.scale, self.ratio)

    def flips(self, draws: Sequence[float]) -> bool:
        """Whether the sample is mirrored; without `vflip` and `rot90` it is turned in no other way."""
        return self.random and self.flip and draws[DRAWS - 1] < 0.5

    def turn(self, draws: Sequence[float]) -> int:
        """How the sample is turned, a `Turn`; `vflip` and `rot90` take ALL_DRAWS numbers."""
        if not self.random or not (self.vflip or self.rot90):
            return self.flips(draws)
        turn = _QUARTERS[int(4 * draws[DRAWS + 1])] if self.rot90 else Turn(0)
        return turn ^ self.flips(draws) ^ (Turn.UPSIDE_DOWN * (self.vflip and draws[DRAWS] < 0.5))


def random_box(
    draws: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """`RandomResizedCrop.get_params`, drawing from `draws` (at least DRAWS numbers in [0, 1))."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        aspect = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[2 * ATTEMPTS] * (height - h + 1))
            left = int(draws[2 * ATTEMPTS + 1] * (width - w + 1))
            return Box(top, left, h, w)
    return _largest_box(height, width, ratio)


def _largest_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest central crop whose aspect lies within `ratio` (torchvision's fallback)."""
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def centre_box(height: int, width: int, input_size: tuple[int, int], share: float = 1.0) -> Box:
    """The largest central box with the input's aspect, or one whose sides are a `share` of that one's.

    Resizing it gives what resizing the shorter side to 1 / share of the input's and cropping the centre would.
    """
    scale = share * min(height / input_size[0], width / input_size[1])
    h = min(max(round(input_size[0] * scale), 1), height)
    w = min(max(round(input_size[1] * scale), 1), width)
    return Box((height - h) // 2, (width - w) // 2, h, w)
