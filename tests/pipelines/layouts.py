"""JPEGs of any chroma layout, which no encoder at hand writes: flat blocks with a few random coefficients."""

from __future__ import annotations

import random
import re

from PIL import Image

from tests.pipelines.pictures import encoded

# What TurboJPEG has a name for, simplejpeg as well but for 1x4 (4:4:1).
KNOWN = ("1x1,1x1,1x1", "2x1,1x1,1x1", "1x2,1x1,1x1", "2x2,1x1,1x1", "4x1,1x1,1x1", "1x4,1x1,1x1", "3x1,3x1,3x1")
UNKNOWN = (
    *("3x1,1x1,1x1", "1x3,1x1,1x1", "3x2,1x1,1x1", "4x2,1x1,1x1", "2x4,1x1,1x1"),
    *("2x2,1x1,2x1", "2x1,1x1,2x1", "2x2,2x1,1x2", "2x1,1x1,1x1,1x1"),
)


class _Writer:
    """Entropy-coded bits; the Huffman tables are Pillow's, which are those of the standard."""

    def __init__(self, tables: bytes) -> None:
        self.codes: dict[int, dict[int, str]] = {}
        while tables:
            number, counts = tables[0], tables[1:17]
            symbols, code, self.codes[number] = iter(tables[17:]), 0, {}
            for length, count in enumerate(counts, 1):
                for _ in range(count):
                    self.codes[number][next(symbols)] = f"{code:0{length}b}"
                    code += 1
                code <<= 1
            tables = tables[17 + sum(counts) :]
        self.bits: list[str] = []

    def value(self, table: int, run: int, value: int) -> None:
        size = abs(value).bit_length()
        self.bits.append(self.codes[table][run << 4 | size])
        if size:
            self.bits.append(f"{value if value > 0 else value + (1 << size) - 1:0{size}b}")

    def ac(self, table: int, rng: random.Random) -> None:
        for _ in range(rng.randrange(5)):
            self.value(table, rng.randrange(4), rng.choice((-3, -2, -1, 1, 2, 3)))
        self.bits.append(self.codes[table][0])

    def flush(self) -> bytes:
        bits = "".join(self.bits)
        bits += "1" * (-len(bits) % 8)
        self.bits.clear()
        return int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:].replace(b"\xff", b"\xff\0")


def _segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def layout_jpeg(layout: str, seed: int = 0, *, progressive: bool = False, restarts: int = 0, mcus: int = 3) -> bytes:
    """A sound JPEG of `mcus` times `mcus` MCUs, with a restart marker after each `restarts`."""
    rng = random.Random(seed)
    sampling = [tuple(map(int, part.split("x"))) for part in layout.split(",")]
    model = encoded(Image.new("CMYK" if len(sampling) == 4 else "RGB", (8, 8)), "JPEG", quality=90)
    tables = [
        model[m.start() + 4 : m.start() + 2 + int.from_bytes(m[1], "big")]
        for m in re.finditer(rb"\xff\xc4(..)", model, re.S)
    ]
    writer, n = _Writer(b"".join(tables)), len(sampling)
    table_of = [min(i, 1) if n == 3 else 0 for i in range(n)]  # for luma or for chroma; Pillow's CMYK has one
    across, down = (8 * mcus * max(factors) for factors in zip(*sampling, strict=True))
    planes = b"".join(bytes((i + 1, h << 4 | v, table_of[i])) for i, (h, v) in enumerate(sampling))
    head = model[: model.index(b"\xff\xc0")]
    head += _segment(
        0xC2 if progressive else 0xC0,
        b"\x08" + down.to_bytes(2, "big") + across.to_bytes(2, "big") + bytes([n]) + planes,
    )
    head += b"".join(_segment(0xC4, table) for table in tables)
    head += _segment(0xDD, restarts.to_bytes(2, "big")) if restarts else b""

    def scan(chosen: list[int], first: int, last: int) -> bytes:
        names = b"".join(bytes((i + 1, 0x11 * table_of[i])) for i in chosen)
        data = _segment(0xDA, bytes([len(chosen)]) + names + bytes((first, last, 0)))
        count = mcus * mcus * (sampling[chosen[0]][0] * sampling[chosen[0]][1] if len(chosen) == 1 else 1)
        for mcu in range(count):
            if restarts and mcu and mcu % restarts == 0:
                data += writer.flush() + bytes((0xFF, 0xD0 + (mcu // restarts - 1) % 8))
            for i in chosen:
                for _ in range(sampling[i][0] * sampling[i][1] if len(chosen) > 1 else 1):
                    if first == 0:
                        writer.value(table_of[i], 0, rng.randrange(-6, 7))
                    if last > 0:
                        writer.ac(16 + table_of[i], rng)
        return data + writer.flush()

    if not progressive:
        return head + scan([*range(n)], 0, 63) + b"\xff\xd9"
    return head + scan([*range(n)], 0, 0) + b"".join(scan([i], 1, 63) for i in range(n)) + b"\xff\xd9"


def scan_start(data: bytes) -> int:
    """Where the entropy-coded bytes of the first scan begin."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
