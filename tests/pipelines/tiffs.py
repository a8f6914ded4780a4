"""TIFFs that Pillow does not write: any bands, bits and formats, uncompressed."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SHORT, _LONG = 3, 4  # types of a tag's values


def tiff(
    samples: np.ndarray,
    *,
    photometric: int = 1,
    extra: tuple[int, ...] = (),
    orientation: int = 1,
    planar: bool = False,
    compression: int = 1,
) -> bytes:
    """A little-endian TIFF of samples (H, W, bands), of any numeric type.

    planar: one band after the other. compression: 1, or 8 for deflate.
    """
    height, width, bands = samples.shape
    bits = samples.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[samples.dtype.kind]
    stored = samples.transpose(2, 0, 1) if planar else samples
    stored = stored.astype(samples.dtype.newbyteorder("<"))
    plain = [band.tobytes() for band in (stored if planar else [stored])]
    strips = [zlib.compress(strip) for strip in plain] if compression == 8 else plain
    content, sizes = b"".join(strips), [len(strip) for strip in strips]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (_LONG, [width]),
        257: (_LONG, [height]),
        258: (_SHORT, [bits] * bands),
        259: (_SHORT, [compression]),
        262: (_SHORT, [photometric]),
        273: (_LONG, [8 + sum(sizes[:i]) for i in range(len(sizes))]),
        274: (_SHORT, [orientation]),
        277: (_SHORT, [bands]),
        278: (_LONG, [height]),
        279: (_LONG, sizes),
        284: (_SHORT, [2 if planar else 1]),
        339: (_SHORT, [kind] * bands),
    }
    if extra:
        tags[338] = (_SHORT, list(extra))
    directory, beyond = struct.pack("<H", len(tags)), b""
    content += bytes(len(content) % 2)
    start = 8 + len(content)
    after = start + 2 + 12 * len(tags) + 4  # where values go that do not fit into their entry
    for tag, (kind, values) in sorted(tags.items()):
        value = b"".join(struct.pack("<H" if kind == _SHORT else "<I", v) for v in values)
        if len(value) > 4:
            value, beyond = struct.pack("<I", after + len(beyond)), beyond + value + bytes(len(value) % 2)
        directory += struct.pack("<HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + content + directory + bytes(4) + beyond
