"""Whether the scans of a Huffman-coded JPEG are whole, judged as libjpeg judges them when it decodes.

Pillow decodes every chroma layout but hides libjpeg's warnings; simplejpeg shows them but decodes only the layouts
that TurboJPEG has a name for. Nothing else that is installed tells a damaged scan of another layout from a whole one.
So these rare files are judged here: the entropy-coded bits are read as libjpeg reads them, without their pixels, and
the first thing that libjpeg would warn of refuses the image. It takes about a second per megabyte of file.

It also tells spare bytes before the end mark, which are harmless, from a scan that seems to end early as it is damaged.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.jpeg_bits import Bits, Table, bad_code, damaged, lookup_table
from spark_fast.pipelines.transforms.jpeg_markers import (
    APP0,
    COM,
    DHT,
    DRI,
    EOI,
    RESTARTS,
    SOF0,
    SOF1,
    SOF2,
    SOS,
    Component,
    Frame,
    Segment,
    next_segment,
    read_frame,
)

_MAX_SCANS = 100  # ten are usual; a small hostile file could keep the reader busy for hours
_SKIPPED = frozenset({0x01, 0xCC, 0xDB, 0xDC, COM, *RESTARTS, *range(APP0, APP0 + 16)})  # no matter here


def find_spare_bytes(data: bytes) -> tuple[int, int]:
    """Judge every scan of a JPEG: where bytes before its end mark begin that may be cut out, and where they end.

    Both are equal where there are none. Raises ImageError with libjpeg's words where libjpeg would warn.
    """
    frame = read_frame(data)
    if frame is None:
        raise ImageError("damaged JPEG: Improper frame or scan header")
    if frame.marker not in (SOF0, SOF1, SOF2):
        raise ImageError(f"a JPEG of chroma layout {frame.layout} can be read only if it is Huffman-coded and lossy")
    return _Judge(data, frame).run()


class _Plane(NamedTuple):
    """A component while its scans are read."""

    component: Component
    blocks: int  # in a scan of its own
    bits: list[int]  # of each coefficient: how many low bits are still to come; -1: all
    nonzero: list[int]  # of each block: bit k is set when coefficient k is not zero


class _Scan(NamedTuple):
    """A scan header."""

    planes: list[_Plane]
    tables: list[tuple[int, int]]  # of each plane: its DC and its AC table
    first: int  # coefficient
    last: int
    high: int
    low: int

    def tables_of_blocks(self) -> list[tuple[int, int]]:
        """Of each block of an MCU."""
        if len(self.planes) == 1:
            return self.tables
        pairs = zip(self.planes, self.tables, strict=True)
        return [tables for plane, tables in pairs for _ in range(plane.component.across * plane.component.down)]


@dataclass
class _Judge:
    """Reads a file's scans from its first marker to its last."""

    data: bytes
    frame: Frame
    tables: dict[int, Table] = field(default_factory=dict)  # by the number in DHT: 16 and more are of AC
    restarts: int = 0
    discarded: int = 0  # bytes that libjpeg has dropped and not yet warned of
    scans: int = 0
    last_tables: list[tuple[Table, Table]] = field(default_factory=list)  # of a sequential scan's MCU
    single: bool = False  # the first scan has all components, and there may be no other

    def __post_init__(self) -> None:
        frame = self.frame
        across = max(c.across for c in frame.components)
        down = max(c.down for c in frame.components)
        self.planes: dict[int, _Plane] = {}
        for c in frame.components:
            blocks = -(-frame.width * c.across // (8 * across)) * -(-frame.height * c.down // (8 * down))
            self.planes.setdefault(c.name, _Plane(c, blocks, [-1] * 64, []))

    def run(self) -> tuple[int, int]:
        """As `find_spare_bytes`."""
        at, bits = 2, None  # what the last scan ended with, when its marker is next
        while True:
            segment = next_segment(self.data, at)
            warned = 0 if bits and bits.met_marker else segment.extraneous + self.discarded
            is_end = segment.marker == EOI and self.scans > 0
            if is_end and not warned:
                return segment.start, segment.start
            if is_end and bits and not self.discarded and _are_spare(bits, self.last_tables):
                return bits.begin + bits.raw_bytes((bits.at + 7) // 8), segment.start
            if warned:
                raise _extraneous(warned, segment)
            at, bits = segment.end, None
            if segment.marker == SOS:
                bits = self._read_scan(segment)
                at = bits.begin + bits.raw_bytes(bits.loaded // 8)
            else:
                self._read_header(segment)

    def _read_header(self, segment: Segment) -> None:
        content = self.data[segment.content : segment.end]
        if segment.marker == DHT:
            self._read_tables(content)
        elif segment.marker == DRI:
            self.restarts = int.from_bytes(content, "big")
        elif segment.marker not in _SKIPPED and (self.scans or segment.marker != self.frame.marker):
            raise damaged(f"Unsupported marker type 0x{segment.marker:02x}")

    def _read_tables(self, content: bytes) -> None:
        while len(content) > 16:
            number, counts = content[0], content[1:17]
            symbols = content[17 : 17 + sum(counts)]
            if len(symbols) < sum(counts) or number & 0xEC:
                raise damaged("Bogus Huffman table definition")
            self.tables[number] = lookup_table(counts, symbols)
            content = content[17 + len(symbols) :]
        if content:
            raise damaged("Bogus marker length")

    def _read_scan(self, segment: Segment) -> Bits:
        """Judge a scan; the last bits of it, up to the next marker."""
        self.scans += 1
        if self.scans > _MAX_SCANS:
            raise damaged(f"more than {_MAX_SCANS} scans")
        scan = self._scan_header(self.data[segment.content : segment.end])
        mcus = self.frame.mcus(True) if len(scan.planes) > 1 else scan.planes[0].blocks
        read = self._progressive if self.frame.marker == SOF2 else self._sequential
        step, bits = self.restarts or mcus, Bits(self.data, segment.end)
        for number, start in enumerate(range(0, mcus, step)):
            if number:
                bits = Bits(self.data, self._restart(bits, RESTARTS[(number - 1) % 8]))
            read(scan, bits, range(start, min(start + step, mcus)))
        return bits

    def _restart(self, bits: Bits, expected: int) -> int:
        """Pass the restart marker behind these bits: where the next ones begin."""
        segment = next_segment(self.data, bits.begin)
        self.discarded += (bits.loaded - bits.at) // 8
        if not bits.met_marker:
            self.discarded += (bits.total - bits.loaded) // 8
            if self.discarded:
                raise _extraneous(self.discarded, segment)
        if segment.marker != expected:
            raise damaged(f"Corrupt JPEG data: found marker 0x{segment.marker:02x} instead of RST{expected & 7}")
        return segment.end

    def _scan_header(self, content: bytes) -> _Scan:
        count = content[0] if content else 0
        if not 1 <= count <= 4 or len(content) != 2 * count + 4:
            raise damaged("Bogus marker length")
        if self.single:
            raise damaged("Didn't expect more than one scan")
        names, tables = content[1 : 1 + 2 * count : 2], content[2 : 2 + 2 * count : 2]
        if len(set(names)) != count or not set(names) <= set(self.planes):
            raise damaged(f"Invalid component ID {names[0]} in SOS")
        first, last, both = content[-3:]
        scan = _Scan(
            [self.planes[name] for name in names], [(t >> 4, t & 15) for t in tables], first, last, both >> 4, both & 15
        )
        if count > 1 and sum(p.component.across * p.component.down for p in scan.planes) > 10:
            raise damaged("Sampling factors too large for interleaved scan")
        self.single = count == len(self.planes) and self.frame.marker != SOF2
        return scan

    def _table(self, number: int) -> Table:
        if number not in self.tables:
            raise damaged(f"Huffman table 0x{number & 15:02x} was not defined")
        return self.tables[number]

    def _sequential(self, scan: _Scan, bits: Bits, mcus: range) -> None:
        if (scan.first, scan.last, scan.high, scan.low) != (0, 63, 0, 0):
            raise damaged("Invalid SOS parameters for sequential JPEG")
        self.last_tables = [(self._table(dc), self._table(16 + ac)) for dc, ac in scan.tables_of_blocks()]
        for _ in mcus:
            for pair in self.last_tables:
                _read_block(bits, *pair)

    def _progressive(self, scan: _Scan, bits: Bits, mcus: range) -> None:
        if mcus.start == 0:
            _check_progression(scan)
        if scan.first > 0:
            self._progressive_ac(scan, bits, mcus)
        elif scan.high:
            for _ in range(len(mcus) * len(scan.tables_of_blocks())):
                bits.take(1)
        else:
            tables = [self._table(dc) for dc, _ in scan.tables_of_blocks()]
            for _ in mcus:
                for table in tables:
                    bits.take(bits.symbol(table) & 15)

    def _progressive_ac(self, scan: _Scan, bits: Bits, mcus: range) -> None:
        nonzero = scan.planes[0].nonzero
        if not nonzero:
            nonzero.extend([0] * scan.planes[0].blocks)
        table = self._table(16 + scan.tables[0][1])
        block, run = mcus.start, 0  # run: of blocks that end with the same code
        while block < mcus.stop:
            if scan.high:
                run = _refine(scan, bits, table, nonzero, block, run)
                block += 1
            else:
                block += 1 + _read_first(scan, bits, table, nonzero, block)


def _are_spare(bits: Bits, tables: list[tuple[Table, Table]]) -> bool:
    """Whether what follows a complete scan is filler, and not the rest of a scan that a fault made seem complete.

    A scan is filled up to a whole byte with ones. What follows it is filler if it is zeros, or one byte again and
    again, or if no more blocks can be read from it up to its very end, which fewer than 64 bytes cannot show.
    `tables` are those of a sequential scan's MCU, or none.
    """
    padding, last, spare = bits.rest()
    if padding.strip("1"):
        return False
    repeated = len(spare) - len(spare.rstrip(spare[-1:]))
    if repeated == len(spare):  # unless the scan seems to be complete as it was filled up with the same
        return spare[:1] != last and (repeated >= 4 or not any(spare))
    filler = repeated if repeated >= 4 else 0
    enough = len(spare) - filler >= 64
    return bool(tables) and enough and not _goes_on(bits, tables, bits.total - 8 * filler)


def _goes_on(bits: Bits, tables: list[tuple[Table, Table]], total: int) -> bool:
    """Whether a scan's bits from here to `total` are blocks, up to the ones that fill the last byte.

    A fault may lie among them, too, so reading also begins halfway and later: it falls into step by itself, as
    Huffman codes do.
    """
    at = bits.at
    later = [total - (total - at) // part for part in (2, 4)]
    try:
        for start, first in ((at, 0), *product(later, range(len(tables)))):
            bits.at, block = start, first
            with suppress(ImageError):
                while bits.at < total:
                    _read_block(bits, *tables[block % len(tables)])
                    block += 1
                    if 0 <= total - bits.at < 8 and not bits.rest()[0].strip("1"):
                        return True
    finally:
        bits.at = at
    return False


def _read_block(bits: Bits, dc_table: Table, ac_table: Table) -> None:
    """One block of a sequential scan."""
    symbol, take = bits.symbol, bits.take
    take(symbol(dc_table) & 15)
    k = 1
    while k < 64:
        both = symbol(ac_table)
        if size := both & 15:
            take(size)
        elif both != 0xF0:
            break
        k += (both >> 4) + 1


def _extraneous(count: int, segment: Segment) -> ImageError:
    return damaged(f"Corrupt JPEG data: {count} extraneous bytes before marker 0x{segment.marker:02x}")


def _check_progression(scan: _Scan) -> None:
    """As `start_pass_phuff_decoder` in libjpeg; notes what the planes have now."""
    dc = scan.first == 0
    in_order = scan.last == 0 if dc else scan.first <= scan.last < 64 and len(scan.planes) == 1
    if not in_order or (scan.high and scan.low != scan.high - 1) or scan.low > 13:
        raise damaged(f"Invalid progressive parameters Ss={scan.first} Se={scan.last} Ah={scan.high} Al={scan.low}")
    for plane in scan.planes:
        expected = [max(bits, 0) for bits in plane.bits[scan.first : scan.last + 1]]
        if (not dc and plane.bits[0] < 0) or any(bits != scan.high for bits in expected):
            raise damaged("Corrupt JPEG data: inconsistent progression sequence")
        plane.bits[scan.first : scan.last + 1] = [scan.low] * len(expected)


def _read_first(scan: _Scan, bits: Bits, table: Table, nonzero: list[int], block: int) -> int:
    """A block of the first scan of some AC coefficients: how many empty ones follow it."""
    k = scan.first
    while k <= scan.last:
        both = bits.symbol(table)
        ahead, size = both >> 4, both & 15
        if size:
            k += ahead
            bits.take(size)
            nonzero[block] |= 1 << min(k, 63)
        elif ahead == 15:
            k += 15
        else:
            return (1 << ahead) + bits.take(ahead) - 1
        k += 1
    return 0


def _refine(scan: _Scan, bits: Bits, table: Table, nonzero: list[int], block: int, run: int) -> int:
    """A block of a later scan, which brings one more bit of the coefficients that are not zero, and new ones.

    Takes and returns how many blocks, from this one or the next, have no new ones.
    """
    k, known = scan.first, nonzero[block]
    while not run and k <= scan.last:
        both = bits.symbol(table)
        ahead, size = both >> 4, both & 15
        if size > 1:
            raise bad_code()
        if size:
            bits.take(1)
        elif ahead < 15:
            run = (1 << ahead) + bits.take(ahead)
            break
        while k <= scan.last:
            if known >> k & 1:
                bits.take(1)
            else:
                ahead -= 1
                if ahead < 0:
                    break
            k += 1
        if size:
            known |= 1 << min(k, 63)
        k += 1
    nonzero[block] = known
    if not run:
        return 0
    for position in range(k, scan.last + 1):
        if known >> position & 1:
            bits.take(1)
    return run - 1
