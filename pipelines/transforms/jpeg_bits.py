"""The bits of a JPEG's scan and the Huffman codes in them, read as libjpeg reads them."""

from __future__ import annotations

import re

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.jpeg_markers import next_marker

_STUFFED = re.compile(rb"\xff+\x00")  # an FF among the data is written so
_NO_CODE = 17 << 8
_LOADED_TO = 57  # libjpeg fills its buffer of 64 bits to this many

Table = list[int]  # of each 16 bits, length << 8 | symbol of the code that they begin with


def damaged(reason: str) -> ImageError:
    """In libjpeg's words."""
    return ImageError(f"damaged JPEG: {reason}")


def bad_code() -> ImageError:
    """Bits that are no code of the table, or a code that cannot be where it is."""
    return damaged("Corrupt JPEG data: bad Huffman code")


class Bits:
    """The bits of a scan up to its next marker, and how far libjpeg has loaded them into its buffer.

    Bytes already loaded when a scan is complete are dropped silently by libjpeg; it warns of bytes left after them.
    """

    def __init__(self, file: bytes, begin: int) -> None:
        self.begin = begin
        self.raw = file[begin : next_marker(file, begin)].rstrip(b"\xff")
        data = _STUFFED.sub(b"\xff", self.raw)
        self.total = 8 * len(data)
        self.at = 0  # bits consumed
        self.loaded = 0
        self.met_marker = False
        self._data = data + bytes(4)

    def symbol(self, table: Table) -> int:
        """Read a Huffman code."""
        at = self.at
        if self.loaded - at < 8:
            self._load(at)
        i, data = at >> 3, self._data
        entry = table[((data[i] << 16 | data[i + 1] << 8 | data[i + 2]) >> (8 - (at & 7))) & 0xFFFF]
        length = entry >> 8
        if length > 8 and self.loaded - at < length:  # libjpeg takes 9 bits, then one at a time
            self._load(at if self.loaded - at < 9 else self.loaded)
        self._advance(length)
        if length == 17:
            raise bad_code()
        return entry & 0xFF

    def take(self, count: int) -> int:
        """Read this many bits, 15 at most."""
        at = self.at
        if self.loaded - at < count:
            self._load(at)
        self._advance(count)
        i, data = at >> 3, self._data
        return ((data[i] << 16 | data[i + 1] << 8 | data[i + 2]) >> (24 - (at & 7) - count)) & ((1 << count) - 1)

    def rest(self) -> tuple[str, bytes, bytes]:
        """What is left: the bits up to the next whole byte, the byte that they end, and the bytes behind it."""
        whole = (self.at + 7) // 8
        last = self._data[max(whole - 1, 0) : whole]
        bits = f"{last[0]:08b}"[8 - (8 * whole - self.at) :] if 8 * whole > self.at else ""
        return bits, last, self._data[whole : self.total // 8]

    def _advance(self, count: int) -> None:
        self.at += count
        if self.at > self.total:
            raise damaged("Corrupt JPEG data: premature end of data segment")

    def _load(self, at: int) -> None:
        self.loaded = (at + _LOADED_TO + 7) & ~7
        if self.loaded > self.total:
            self.loaded, self.met_marker = self.total, True

    def raw_bytes(self, count: int) -> int:
        """How long this many bytes are in the file."""
        for stuffed in _STUFFED.finditer(self.raw):
            if stuffed.start() >= count:
                break
            count += stuffed.end() - stuffed.start() - 1
        return count


def lookup_table(counts: bytes, symbols: bytes) -> Table:
    """A table for `Bits.symbol` of how many codes there are of each length, 1 to 16, and their symbols in order."""
    table: Table = []
    lengths = [length for length, count in enumerate(counts, 1) for _ in range(count)]
    for length, symbol in zip(lengths, symbols, strict=True):
        table += [length << 8 | symbol] * (1 << (16 - length))
        if len(table) >= 1 << 16:  # a code of ones alone is not allowed
            raise damaged("Bogus Huffman table definition")
    return table + [_NO_CODE] * ((1 << 16) - len(table))
