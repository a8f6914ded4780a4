"""A library leaves the process of whoever imports it as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
before = dict(os.environ), list(sys.path)
import spark_fast, spark_fast.pipelines

spark_fast.build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32)
try:
    spark_fast.build_spark("nowhere:build", input_size=64)
except ValueError:
    pass
after = dict(os.environ), list(sys.path)
print(json.dumps({"before": before, "after": after}))
"""


@pytest.mark.slow
def test_importing_it_and_building_a_model_change_neither_environment_nor_path(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    (tmp_path / "script.py").write_text(SCRIPT)  # a script in another folder: the current one is not on its path
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True, text=True, env=environment, cwd=tmp_path / "elsewhere",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"] == found["before"]
