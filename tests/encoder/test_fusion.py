"""The compiler fuses packed norms as far as kernels by hand do, so compiled code takes none of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import HANG_SECONDS

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_norms_are_fused_and_read_the_map_no_more_than_they_must():
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("fused_norms.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    # y and the gradient of x in one pass; the gradients of scale and shift in a reduction of two steps
    assert len(made["layer"]) == 3, made
    # the two statistics, then normalise and ReLU in one; the two sums of the backward pass, then the gradient in one
    assert sum("_red_" in name for name in made["batch"]) == 2, made
    maps = [name for name in made["batch"] if "_poi_" in name]
    assert len(maps) == 2, made
    assert "relu" in maps[0], made
    assert all("native_batch_norm" in name for name in maps), made
