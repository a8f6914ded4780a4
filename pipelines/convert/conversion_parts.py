"""One of N parts of a conversion, so that N machines can share the work: which shards a part writes, and its manifest.

A part is every N-th shard. Done, it leaves part-I-of-N.json beside its shards and their reports: what it wrote, from
what, and with which settings.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from spark_fast.errors import DataError, SettingsError
from spark_fast.files import atomic_write

Job = TypeVar("Job")


@dataclass(frozen=True)
class Part:
    """Part `number` (1 ... of) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From "I/N"; SettingsError when that is none."""
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise SettingsError(
                f"part must be I/N with 1 <= I <= N <= 9999, such as 2/4 for the second of four; got {text!r}"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"part-{self.number:04d}-of-{self.of:04d}"

    def share(self, jobs: list[Job]) -> list[Job]:
        """Those of all jobs that are this part's."""
        return jobs[self.number - 1 :: self.of]


@dataclass(frozen=True)
class PartManifest:
    """The contents of part-I-of-N.json."""

    number: int
    of: int
    splits: list[str]  # of the whole conversion: names of the folders; empty: no splits
    root: str  # where the images were
    labelled: bool
    classes: list[str]
    made_from: dict[str, object]  # as in the manifest of the whole
    shards: list[str]  # file names, also of shards with no readable image in them

    @property
    def part(self) -> Part:
        """Which part this is."""
        return Part(self.number, self.of)


def write_part(folder: Path, manifest: PartManifest) -> None:
    """Declare a part finished; raises OSError."""
    with atomic_write(folder / f"{manifest.part.name}.json") as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode())


def read_parts(folder: Path) -> list[PartManifest]:
    """The parts in `folder`, all of them, in order.

    Raises DataError when one is missing or damaged, or they do not belong together.
    """
    parts = [_read_part(path) for path in sorted(folder.glob("part-????-of-????.json"))]
    if not parts:
        raise DataError(
            f"no part is finished in {folder}: it has no part-I-of-N.json. First run --part I/N for each part"
        )
    if len(divisions := sorted({p.of for p in parts})) > 1:
        raise DataError(
            f"{folder} holds parts of different divisions (into {divisions}): keep the parts of only one of them"
        )
    if missing := sorted(set(range(1, parts[0].of + 1)) - {p.number for p in parts}):
        names = ", ".join(f"{number}/{parts[0].of}" for number in missing)
        raise DataError(f"{folder}: part {names} is missing: run it, or copy its files here, then merge again")
    for p in parts[1:]:
        if found := _differences(parts[0], p):
            raise DataError(f"{folder}: part {p.part} was made with other settings than part {parts[0].part} ({found})")
    return parts


def _read_part(path: Path) -> PartManifest:
    try:
        manifest = PartManifest(**json.loads(path.read_bytes()))
        if path.stem != manifest.part.name:
            raise ValueError(f"it belongs to part {manifest.part}")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): run this part again") from error
    return manifest


def _differences(one: PartManifest, other: PartManifest) -> str:
    a = {**one.made_from, "splits": one.splits, "labelled": one.labelled, "classes": one.classes}
    b = {**other.made_from, "splits": other.splits, "labelled": other.labelled, "classes": other.classes}
    return "; ".join(f"{key}: {a.get(key)} -> {b.get(key)}" for key in a | b if a.get(key) != b.get(key))
