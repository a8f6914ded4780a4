"""Drills of the storage side: files made to hurt whoever opens them (row 10)."""

import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.checkpoint.test_file import Evil
from tests.commands import HANG_SECONDS

HOSTILE = """
import sys
from pathlib import Path
from spark_fast.checkpoint.file import CheckpointError
from spark_fast.operating_system import peak_resident_bytes
from spark_fast.weights.load import load_weights
from torch import nn

before = peak_resident_bytes()
for path in sys.argv[1:]:
    try:
        load_weights(Path(path), nn.Linear(2, 2))
    except CheckpointError as error:
        print((peak_resident_bytes() - before) >> 20, error)
"""


def hostile(kind, path):
    """Write a file that hurts whoever opens it unprepared; what must be said of it."""
    if kind == "code":
        torch.save({"model": Evil(path.with_name("touched"))}, path)
        return "was not loaded: it is damaged, or holds pickled code"
    if kind == "bomb":
        torch.save({"a": torch.zeros(3)}, path)
        small = path.with_name("small.pth")
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
            for name in old.namelist():  # 300 MB of zeros in 1.3 MB
                new.writestr(name, bytes(300 << 20) if name.endswith("data/0") else old.read(name))
        small.replace(path)
        assert path.stat().st_size < 2 << 20
        return "its records are compressed"
    if kind == "header":
        header = b'{"a":' + b"[" * (300 << 20)
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        return "its safetensors header has"
    if kind == "nested":
        torch.save({"a": torch.zeros(3)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/more/data.pkl", b"]" * (20 << 20))
        return "more than any state dict needs"
    count = 0x3FFFFFFF  # "tensor": four GB of float32 over twelve bytes of storage
    torch.save({"a": torch.zeros(77777)[:3].clone(), "b": torch.zeros(77777)}, path)
    grown = path.with_name("grown.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(grown, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"J" + struct.pack("<i", 77777), b"J" + struct.pack("<i", count))
                assert struct.pack("<i", count) in content
            new.writestr(name, content)
    grown.replace(path)
    return "it is damaged (record size"


@pytest.mark.slow
def test_hostile_files_are_refused_cost_no_memory_and_run_nothing(tmp_path):
    """Row 10: five files, one process, whose peak is the worst of them."""
    paths, told = [], []
    for kind in ("code", "bomb", "header", "nested", "tensor"):
        paths.append(tmp_path / f"{kind}.{'safetensors' if kind == 'header' else 'pth'}")
        told.append(hostile(kind, paths[-1]))
    done = subprocess.run([sys.executable, "-c", HOSTILE, *paths], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths), done.stdout
    for line, path, reason in zip(lines, paths, told, strict=True):
        assert str(path) in line
        assert reason in line
    assert int(lines[-1].split()[0]) < 200, "MB more at the peak"
    assert not (tmp_path / "touched").exists()
