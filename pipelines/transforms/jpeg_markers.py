"""The markers of a JPEG file: where its segments are, and what its frame header says.

libjpeg reads the files. This is for what it does not tell: the chroma layout, and where a header may be changed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from spark_fast.errors import ImageError

SOF0, SOF1, SOF2, DHT, SOI, EOI, SOS, DRI, APP0, APP14, COM = (
    *(0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDD),
    *(0xE0, 0xEE, 0xFE),
)
RESTARTS = range(0xD0, 0xD8)
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}  # all but DHT, JPG and DAC
_ALONE = frozenset({0x01, SOI, EOI, *RESTARTS})  # markers without content
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)


class Segment(NamedTuple):
    """A marker and its content, as offsets into the file."""

    marker: int
    start: int  # of the marker
    content: int  # behind the marker and the two bytes of its length
    end: int
    extraneous: int  # bytes before it that belong to nothing


class Component(NamedTuple):
    """One plane of a frame and how finely it is sampled, 1 to 4 each way."""

    name: int
    across: int
    down: int


class Frame(NamedTuple):
    """What a frame header says."""

    marker: int  # SOF0 and so on: the kind of coding
    height: int
    width: int
    components: tuple[Component, ...]
    restarts: int  # interval in MCUs, 0: none
    scan: int  # where its first scan header is

    @property
    def layout(self) -> str:
        """Such as 2x2,1x1,1x1, which is 4:2:0."""
        return ",".join(f"{c.across}x{c.down}" for c in self.components)

    def mcus(self, interleaved: bool) -> int:
        """How many a scan of all components has, or at most one of a single component (which has one per block)."""
        across, down = (8 * max(factors) for factors in list(zip(*self.components, strict=True))[1:])
        if not interleaved:
            across = down = 8
        return -(-self.height // down) * -(-self.width // across)


def next_marker(data: bytes | memoryview, at: int) -> int:
    """Where the first marker at or behind an offset is. ImageError when there is none."""
    if data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\x00", b"\xff"):
        return at
    if found := _MARKER.search(data, at):
        return found.start()
    raise ImageError("damaged JPEG: Premature end of JPEG file")


def next_segment(data: bytes | memoryview, at: int) -> Segment:
    """The first segment at or behind an offset. ImageError when the file ends before it does."""
    start = next_marker(data, at)
    marker, content = data[start + 1], start + 2
    extraneous = len(bytes(data[at:start]).rstrip(b"\xff"))  # any number of FF may fill up before a marker
    if marker in _ALONE:
        return Segment(marker, start, content, content, extraneous)
    end = content + max(int.from_bytes(data[content : content + 2], "big"), 2)
    if end > len(data):
        raise ImageError("damaged JPEG: Premature end of JPEG file")
    return Segment(marker, start, content + 2, end, extraneous)


def read_frame(data: bytes | memoryview) -> Frame | None:
    """The header of a JPEG up to its first scan; None when it has none. Raises ImageError when the file ends first."""
    at, restarts, frame, marker = 2, 0, 0, 0
    while marker != SOS:
        at = next_marker(data, at)
        marker = data[at + 1]
        length = 0 if marker in _ALONE else max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
        if marker in FRAMES and not frame:
            frame = at
        elif marker == DRI:
            restarts = int.from_bytes(data[at + 4 : at + 6], "big")
        elif marker == EOI:
            return None
        at += 2 + length
    if at > len(data):
        raise ImageError("damaged JPEG: Premature end of JPEG file")
    content = data[frame + 4 : frame + 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")]
    if not frame or len(content) < 9 or len(content) != 6 + 3 * content[5]:
        return None
    components = tuple(
        Component(content[i], content[i + 1] >> 4, content[i + 1] & 15) for i in range(6, len(content), 3)
    )
    if not all(1 <= c.across <= 4 and 1 <= c.down <= 4 for c in components):
        return None
    height, width = (int.from_bytes(content[i : i + 2], "big") for i in (1, 3))
    return Frame(data[frame + 1], height, width, components, restarts, at - 2 - length)
