"""ImageNet's tars as downloaded, made from folders."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_of_tars(folder: Path) -> bytes:
    """What image-net.org would make of a folder of class folders; last class first, since no order is promised."""
    classes = sorted((path for path in folder.iterdir()), reverse=True)
    return tar_of({f"{c.name}.tar": tar_of({p.name: p.read_bytes() for p in sorted(c.iterdir())}) for c in classes})
