"""What to do with compressed archives: nothing in them can be read without unpacking all that comes before it."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path

from spark_fast.pipelines.sources.listing.image_names import is_image

_COMPRESSED = re.compile(r".*\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|zip)", re.IGNORECASE)
_CLASS_LAST = re.compile(r".*_(n\d+)\.JPEG")  # ImageNet on the Hugging Face Hub: n01440764_10026_n01440764.JPEG
_LOOKED_AT = 100  # members of an archive


def is_compressed(name: str) -> bool:
    """Whether a file of this name is a compressed archive."""
    return _COMPRESSED.fullmatch(name) is not None


def how_to_unpack(archives: list[Path]) -> str:
    """The commands that make the images in these archives of one folder readable, with labels where names hold them."""
    quoted = [shlex.quote(str(path)) for path in archives]
    zipped = archives[0].suffix.lower() == ".zip"
    unpack = 'unzip -q "$a" -d IMAGES' if zipped else 'tar -xf "$a" -C IMAGES'
    commands = [f"mkdir IMAGES; for a in {' '.join(quoted)}; do {unpack}; done"]
    after = "then give IMAGES"
    if not zipped and _names_classes(archives[0]):
        listing = r"(cd IMAGES && ls | sed -nE 's/^(.*_(n[0-9]+)\.JPEG)$/\1 \2/p' > list.txt)"
        commands.append(listing)
        after = "then give IMAGES, or IMAGES/list.txt for labels: the class is the end of each name"
    lines = "".join(f"\n  {command}" for command in commands)
    return f"{archives[0]} is compressed and has no random access. Unpack it:{lines}\n{after}."


def _names_classes(archive: Path) -> bool:
    """Whether the first images of a tar have their class at the end of their names."""
    try:
        with tarfile.open(archive) as tar:
            members = (member.name for member, _ in zip(tar, range(_LOOKED_AT), strict=False))
            first = next((name for name in members if is_image(Path(name).name)), "")
    except (OSError, EOFError, tarfile.TarError):
        return False
    return _CLASS_LAST.fullmatch(first) is not None
