"""Re-encode an image for a shard: a baseline JPEG, 4:2:0, RGB colours, reduced to the size asked for.

So every decoder, those in hardware too, takes its fast path. An image that is like that already is copied
byte for byte: no second generation of JPEG artefacts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import simplejpeg
from numpy.typing import NDArray

from spark_fast.errors import ImageError, SettingsError
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.listing.image_names import IMAGE_EXTENSIONS
from spark_fast.pipelines.sources.shard_format import JPG
from spark_fast.pipelines.transforms.decode import MAX_PIXELS, decode_image
from spark_fast.pipelines.transforms.pillow_pixels import Loss
from spark_fast.pipelines.transforms.resize import resize

_MAX_JPEG_SIDE = 65500  # libjpeg's limit


class Reencoded(NamedTuple):
    """A record of a shard."""

    content: bytes
    repair: str | None  # what was repaired; None: nothing
    losses: tuple[Loss, ...]  # what of the image was lost
    pixels: NDArray | None = None  # as stored, (H, W, C), where they are to be measured


@dataclass(frozen=True)
class StoredSize:
    """Size of what is stored. Images are never enlarged; 0 for both sides keeps their size."""

    short_side: int = 256
    max_side: int = 0

    def __post_init__(self) -> None:
        if self.short_side and self.max_side:
            raise SettingsError(
                f"short_side {self.short_side} and max_side {self.max_side} exclude each other: choose one"
            )
        if self.short_side < 0 or self.max_side < 0:
            raise SettingsError("short_side and max_side must be numbers of pixels, or 0 to keep the size")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Stored height and width of an image."""
        factor = 1.0
        if self.short_side:
            factor = self.short_side / min(height, width)
        elif self.max_side:
            factor = self.max_side / max(height, width)
        if factor >= 1:
            return height, width
        return max(round(height * factor), 1), max(round(width * factor), 1)


@dataclass(frozen=True)
class Reencode(StoredSize):
    """Size and quality of the JPEGs."""

    quality: int = 90
    max_pixels: int = MAX_PIXELS  # of an image; a larger one is refused

    endings: ClassVar[tuple[str, ...]] = IMAGE_EXTENSIONS
    suffix: ClassVar[str] = JPG

    def __post_init__(self) -> None:
        super().__post_init__()
        check_max_pixels(self.max_pixels)
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"quality must be from 1 to 100 (90 is usual), got {self.quality}")

    def samples(self, source: FileSource) -> FileSource:
        """The source of the records: one a file."""
        source.allow_pixels(self.max_pixels)
        return source

    def reencoded(self, data: bytes | memoryview) -> Reencoded:
        """The JPEG to store for an encoded image, what was repaired (None: nothing), and what of it was lost.

        Raises ImageError when the image cannot be read or stored.
        """
        # A coarser chroma is stored than is made here.
        image, repair, losses = decode_image(data, self.max_pixels, fast_chroma=True)
        height, width = image.shape[:2]
        size = self.size(height, width)
        if size == (height, width) and not repair and _is_plain(data):
            return Reencoded(bytes(data), None, losses)
        if size != (height, width):
            fewer_rows = resize(image, (size[0], width))  # first: the pass along rows is the slower one
            image = resize(fewer_rows, size)
        if max(size) > _MAX_JPEG_SIDE:
            raise ImageError(f"{size[1]} x {size[0]} pixels: a JPEG cannot be longer than {_MAX_JPEG_SIDE}")
        jpeg = simplejpeg.encode_jpeg(image, self.quality, "RGB", "420")
        return Reencoded(jpeg, repair, losses)


def check_max_pixels(max_pixels: int) -> None:
    """Raise SettingsError where no image can be so small."""
    if max_pixels < 1:
        raise SettingsError("max_pixels must be 1 (million) or more")


def _is_plain(data: bytes | memoryview) -> bool:
    """Whether a readable JPEG is baseline with YCbCr colours, which every decoder takes."""
    if simplejpeg.decode_jpeg_header(data, strict=False)[2] != "YCbCr":
        return False
    view, at = memoryview(data), 2
    while at + 4 <= len(view) and view[at] == 0xFF:  # segments: FF, marker, length (2 bytes), content
        marker = view[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame, of any kind
            return marker == 0xC0
        at += 2 + int.from_bytes(view[at + 2 : at + 4], "big")
    return False  # fill bytes or other oddities between segments: encode it again
