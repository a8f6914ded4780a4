"""PNG files without their text and colour profiles.

Neither has a bearing on the pixels as they are read here. Pillow inflates them, and refuses a file where they are over
a megabyte. So they are taken out before Pillow sees them, and a bomb in a comment is never unpacked.
"""

from __future__ import annotations

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_text(data: bytes | memoryview) -> bytes | memoryview:
    """The same PNG without these chunks; any other file as it is."""
    if bytes(data[:8]) != SIGNATURE:
        return data
    kept, start, at = [], 0, 8  # start: of what is kept next
    while at + 12 <= len(data):  # a chunk is length (4 bytes), kind (4), content, checksum (4)
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if bytes(data[at + 4 : at + 8]) in _TEXT and end <= len(data):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join((*kept, data[start:])) if kept else data
