"""From labels as written, in a list or beside the images of a tar, to numbers of classes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError

logger = logging.getLogger("spark_fast.pipelines")

MOST_CLASSES = 2**24  # a larger label is no number of a class
MOST_BYTES = 256  # of a name
_WHOLE = re.compile(rb"[-+]?\d+")
_DECIMAL = re.compile(rb"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?")


def class_numbers(texts: Sequence[bytes], where: Callable[[int], str]) -> tuple[NDArray[np.int32], list[str]]:
    """Numbers, (n,), and the classes' names, none if all labels are numbers already; names are numbered as sorted.

    Args:
        where: what to call the place of a label, by its number, in a message.

    Raises DataError for a label that is no class, and for numbers among names.
    """
    whole = _WHOLE.fullmatch(texts[0]) is not None
    for i, text in enumerate(texts):
        if problem := _problem(text, whole):
            shown = text[:40].decode("utf-8", "backslashreplace")
            raise DataError(f"{where(i)}: label {shown!r} {problem}")
    if whole:
        return np.array([int(text) for text in texts], dtype=np.int32), []
    names = sorted(set(texts))
    number = {name: i for i, name in enumerate(names)}
    classes = [name.decode("utf-8", "backslashreplace") for name in names]
    logger.info("labels are names: %d classes, numbered in sorted order from %r = 0", len(classes), classes[0])
    return np.array([number[text] for text in texts], dtype=np.int32), classes


def _problem(text: bytes, whole: bool) -> str:
    """What is wrong with a label where all are whole numbers, or all are names; "" for nothing."""
    if not text:
        return "is missing"
    if not _WHOLE.fullmatch(text):
        if len(text) > MOST_BYTES or min(text) < 32:
            return f"is not a number or a name of at most {MOST_BYTES} bytes"
        if _DECIMAL.fullmatch(text):
            return "is not a whole number"
        return "is not a number, unlike those before it" if whole else ""
    if not whole:
        return "is a number, unlike those before it"
    if text.startswith(b"-") and text.strip(b"-0"):
        return "is negative, but classes are numbered from 0. For unlabelled images, leave out all labels"
    if len(text.lstrip(b"-+0")) > 18 or int(text) >= MOST_CLASSES:
        return f"is too large for a class number: the limit is {MOST_CLASSES - 1}"
    return ""
