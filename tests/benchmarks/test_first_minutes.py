"""The first minutes on a GPU: the order and limits of their steps, and what is kept when they are cut off."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.benchmarks.test_device_report import BENCHMARKS, written
from tests.commands import HANG_SECONDS

SCRIPT = BENCHMARKS / "first_minutes.sh"
# a Python that measures nothing: it writes a row for the part it is asked for, and stays with the profile
STAND_IN = """#!{python}
import json, os, sys, time
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if "--only" in words:
    row = {{"part": words["--only"], "name": "row", "seconds": words["--seconds"], "pid": os.getpid()}}
    with open(words["--rows"], "a") as rows:
        rows.write(json.dumps(row) + "\\n")
    if words["--only"] == os.environ["STAYS_WITH"]:
        open(os.environ["ARRIVED"], "w").write("here")
        time.sleep(1000)
"""


@pytest.fixture
def environment(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    own = {"OUT": str(tmp_path / "out"), "PYTHON": str(stand_in), "TMPDIR": str(tmp_path / "tmp"), "STAYS_WITH": ""}
    return os.environ | own


def steps(file):
    return [row for row in written(file) if "step" in row]


def test_the_steps_come_in_order_and_end_within_nine_and_a_half_minutes(environment, tmp_path):
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    rows = written(tmp_path / "out" / "first_minutes.jsonl")
    ended = steps(tmp_path / "out" / "first_minutes.jsonl")
    parts = ["ceilings", "step resnet*", "profile", "layers", "GPU tests", "compiled step resnet*", "step convnext*",
             "encoder", "loader", "packed = masked"]  # fmt: skip
    assert [row["step"] for row in ended] == ["imports", *parts]
    assert {row["code"] for row in ended} == {0}
    assert [row["limit"] for row in ended[1:]] == [20, 60, 25, 50, 75, 100, 60, 35, 60, 60]
    assert [row["seconds"] for row in rows if "part" in row] == [str(row["limit"]) for row in ended[1:]]
    assert sum(row["limit"] for row in ended) <= 9.5 * 60
    assert [json.loads(line) for line in done.stdout.splitlines()] == ended
    assert not list((tmp_path / "tmp").iterdir())


def test_every_step_names_a_part_of_the_report(tmp_path):
    import device_report
    from torch import device

    parts = device_report.all_parts(device_report.FULL, device("cuda"), tmp_path)
    asked = [match.strip("'") for match in re.findall(r"^step \d+ ('.*?'|\w+)", SCRIPT.read_text(), re.MULTILINE)]
    found = {pattern: [name for name in parts if device_report.fnmatchcase(name, pattern)] for pattern in asked}
    assert all(found.values())
    assert found["step resnet*"] == ["step resnet50 224"]
    assert found["step convnext*"][:2] == ["step convnext_small 224", "step convnextv2_tiny 224 FCMAE"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_done_is_kept_when_it_is_cut_off(environment, tmp_path, how):
    os.mkfifo(tmp_path / "arrived")
    arrived = os.open(tmp_path / "arrived", os.O_RDWR)
    there = {"STAYS_WITH": "profile", "ARRIVED": str(tmp_path / "arrived")}
    script = subprocess.Popen(["bash", SCRIPT], env=environment | there, stdout=subprocess.DEVNULL)
    try:
        assert select.select([arrived], [], [], HANG_SECONDS)[0]
        script.send_signal(how)
        assert script.wait(HANG_SECONDS) == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[how]
        rows = written(tmp_path / "out" / "first_minutes.jsonl")
        assert [row.get("part") or row["step"] for row in rows] == [
            "imports", "ceilings", "ceilings", "step resnet*", "step resnet*", "profile",
        ]  # fmt: skip
        if how is signal.SIGTERM:
            assert not list((tmp_path / "tmp").iterdir())
            with pytest.raises(ProcessLookupError):
                os.kill(rows[-1]["pid"], 0)
    finally:
        script.kill()
        os.close(arrived)
        with suppress(ProcessLookupError, IndexError, KeyError):
            os.kill(written(tmp_path / "out" / "first_minutes.jsonl")[-1]["pid"], signal.SIGKILL)


@pytest.mark.drill
def test_the_rehearsal_on_a_cpu_keeps_its_rows_when_it_is_cut_off(tmp_path):
    own = {
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
        "PACE": "30",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    file = tmp_path / "first_minutes.jsonl"
    script = subprocess.Popen(
        ["bash", SCRIPT, "--threads", "1"], env=os.environ | own, stdout=subprocess.PIPE, text=True
    )
    try:
        assert script.stdout is not None
        next(line for line in script.stdout if json.loads(line)["step"] == "ceilings")
        while not any("images/s" in row for row in written(file)):  # in the middle of a step
            assert script.poll() is None
            time.sleep(0.1)
        script.terminate()
        assert script.wait(HANG_SECONDS) == 143
    finally:
        script.kill()
    rows = written(file)
    by_name = {row["name"]: row for row in rows if "part" in row}
    assert by_name["machine"]["smoke_test"]
    assert by_name["copy"]["GB/s"] > 0
    assert by_name["packed Triton"]["skipped"] == "takes a GPU"
    assert by_name["published"]["images/s"] > 0
    assert [(row["step"], row["code"]) for row in steps(file)] == [("imports", 0), ("ceilings", 0)]
