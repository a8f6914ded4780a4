"""One JPEG to pixels by libjpeg-turbo, judged strictly: where libjpeg warns of the data, the image is refused.

Where libjpeg would only warn and go on with grey blocks (file cut short, bad Huffman code, bytes between segments),
nobody would see the grey. So an image is taken when `djpeg` decodes it with exit code 0, and refused otherwise, but
for three faults that leave every pixel as it was written: an unknown JFIF revision, zeros for the parameters of a
sequential scan, which are constants, and spare bytes before the end mark. They are taken out, and the rest is judged.

simplejpeg decodes, and shows libjpeg's warnings. It refuses chroma layouts that TurboJPEG has no name for; Pillow
decodes those, and `jpeg_scans` judges them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.jpeg_markers import (
    APP0,
    APP14,
    COM,
    EOI,
    SOF0,
    SOF1,
    SOS,
    Frame,
    next_segment,
    read_frame,
)
from spark_fast.pipelines.transforms.jpeg_scans import find_spare_bytes

_SPARE = "extraneous bytes before marker 0xd9"  # in libjpeg's warning
_MAX_RESTARTS = 65535

CheckSize = Callable[[int, int], None]  # height, width; raises ImageError


def decode_jpeg(
    data: bytes | memoryview, check_size: CheckSize, *, fast_chroma: bool = False, judged: bool = False
) -> tuple[NDArray[np.uint8], str | None]:
    """Decode a JPEG.

    Returns the pixels, (H, W, 3) uint8 RGB, and what to say of a file that is no plain colour JPEG.

    Args:
        check_size: called before memory is allocated.
        fast_chroma: repeat coarser chroma where it would be interpolated.
        judged: these bytes were decoded before, so that libjpeg need not look as closely: 8 % less time.

    Raises:
        ImageError: the file is damaged, or no JPEG that can be read.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except Exception as error:  # KeyError, too, where TurboJPEG knows more layouts than simplejpeg
        return _decode_odd(bytes(data), check_size, str(error), fast_chroma)
    check_size(height, width)
    try:
        pixels = _decode(data if judged else _without_fast_route(data), colours in ("CMYK", "YCCK"), fast_chroma)
    except ValueError as error:
        return _decode_odd(bytes(data), check_size, str(error), fast_chroma)
    return pixels, None if colours in ("YCbCr", "RGB") else f"JPEG of other colours ({colours}), stored as RGB"


def _decode(data: bytes | memoryview, cmyk: bool, fast_chroma: bool) -> NDArray[np.uint8]:
    """As simplejpeg does. Raises ValueError with libjpeg's first warning."""
    if cmyk:
        inverted = 255 - simplejpeg.decode_jpeg(data, "CMYK")  # by Adobe's custom and Pillow's reading
        return np.array(Image.fromarray(inverted, "CMYK").convert("RGB"))
    return simplejpeg.decode_jpeg(data, "RGB", fastupsample=fast_chroma)


def _without_fast_route(data: bytes | memoryview) -> bytes | memoryview:
    """The same JPEG, such that libjpeg-turbo warns of every bad Huffman code.

    Its fast route over a sequential scan takes a bad code for a zero without a word. The route is closed where there
    are restart markers. So this declares an interval that is longer than the scan: the markers then never come. A scan
    of more MCUs than an interval can have (16.8 million pixels at 4:2:0) stays as it is.
    """
    frame = read_frame(data)
    if frame is None or frame.marker not in (SOF0, SOF1) or frame.restarts:
        return data
    interleaved = len(frame.components) > 1 and data[frame.scan + 4] == len(frame.components)
    if frame.mcus(interleaved) > _MAX_RESTARTS:
        return data
    at = frame.scan
    return b"".join((data[:at], b"\xff\xdd\0\4", _MAX_RESTARTS.to_bytes(2, "big"), data[at:]))


def _decode_odd(
    data: bytes, check_size: CheckSize, reason: str, fast_chroma: bool
) -> tuple[NDArray[np.uint8], str | None]:
    """Decode a JPEG that simplejpeg refuses, for a `reason` that may be harmless."""
    frame = None
    with suppress(ImageError):
        frame = read_frame(data)
    if frame is None:
        raise ImageError(f"not a readable image ({reason}); it starts with {data[:12]!r}")
    check_size(frame.height, frame.width)
    data = _without_harmless_faults(data, frame)
    what = f"JPEG of chroma layout {frame.layout}, stored as 4:2:0"
    try:
        simplejpeg.decode_jpeg_header(data)
        what = f"JPEG with a fault that spares the pixels ({reason}), stored without it"
    except KeyError:  # TurboJPEG has a name for the layout, so `decode_jpeg` works
        pass
    except ValueError:  # it has none, or there is a fault, which will be found
        return _decode_with_pillow(_without_spare_bytes(data)), what
    try:
        try:
            return _decode(_without_fast_route(data), len(frame.components) == 4, fast_chroma), what
        except ValueError as error:
            if _SPARE not in str(error):
                raise
            data = _without_spare_bytes(data)
            return _decode(_without_fast_route(data), len(frame.components) == 4, fast_chroma), what
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error


def _without_spare_bytes(data: bytes) -> bytes:
    """The same JPEG without spare bytes before its end mark. ImageError where libjpeg would warn of its scans."""
    begin, end = find_spare_bytes(data)
    return data[:begin] + data[end:]


def _without_harmless_faults(data: bytes, frame: Frame) -> bytes:
    """The same JPEG with its harmless faults taken out, and without segments that have no bearing on the pixels."""
    kept, at = [data[:2]], 2
    while True:
        segment = next_segment(data, at)
        content = data[segment.content : segment.end]
        only_these = content[-3:] == bytes(3) and any(data[segment.end : segment.end + 1])  # not a part set to zero
        if segment.marker == SOS and frame.marker in (SOF0, SOF1) and only_these:
            content = content[:-3] + b"\0\x3f\0"  # the first and the last coefficient, and all of their bits
        elif segment.marker == APP0 and content[:5] == b"JFIF\0":
            content = content[:5] + b"\1" + content[6:]
        elif segment.marker == COM or (segment.marker in range(APP0, APP0 + 16) and segment.marker != APP14):
            segment, content = segment._replace(content=segment.start), b""
        kept += [data[at : segment.content], content]
        at = segment.end
        if segment.marker == EOI:
            return b"".join(kept)


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # on hostile bytes Pillow's plug-ins raise nearly anything
        raise ImageError(f"damaged JPEG: {error}") from error
