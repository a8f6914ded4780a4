"""The report of a GPU, as a smoke test on the CPU: every part runs or says why not, and a failure is only its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# as on a machine with torch, torchvision, timm and triton alone
BARE = """
import runpy, sys
for name in ("simplejpeg", "tyro", "rich", "safetensors", "matplotlib", "tomli_w", "tensorboard"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import measuring
from pathlib import Path
measuring.RESULTS = Path(sys.argv[2])
sys.argv = ["device_report", *sys.argv[3:]]
runpy.run_path(sys.path[0] + "/device_report.py", run_name="__main__")
"""


def report(folder, *words):
    command = [sys.executable, "-c", BARE, str(BENCHMARKS), str(folder), "--device", "cpu", "--threads", "1", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_runs_without_a_gpu_or_says_why_not(tmp_path):
    done = report(tmp_path, "--name", "smoke")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kept = json.loads((tmp_path / "smoke.json").read_text())
    assert kept["smoke_test"]
    assert kept["versions"]["torch"]
    assert kept["machine"]["device"]
    rows = {(row["part"], row["name"]): row for row in kept["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    reasons = {row["skipped"] for row in rows.values() if "skipped" in row}
    assert {"takes a GPU", "the smoke test does not compile"} <= reasons
    for row in rows.values():
        assert all(v > 0 for k, v in row.items() if k in ("images/s", "MFU", "GB/s", "TFLOP/s", "seconds", "peak GiB"))
    equal = [row for (part, _), row in rows.items() if part == "packed = masked"]
    assert len(equal) == 4
    assert all(0 < row["packed gradient off by"] < 1e-4 for row in equal if "fp32" in row["name"])
    assert 0 <= rows["loader", "end to end, decode on host"]["data wait"] < 1
    assert "no simplejpeg" in rows["loader", "decode on host, augment on host"]["note"]
    assert "no plot: matplotlib is not installed" in done.stdout


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import device_parts
    import device_report

    return device_report, device_parts


def test_what_does_not_fit_into_the_time_is_listed_and_a_failure_is_its_own(measured, monkeypatch):
    device_report, device_parts = measured
    monkeypatch.setattr(device_report.time, "monotonic", lambda: 100.0)

    def fail():
        raise RuntimeError("out of luck")

    def skip():
        raise device_parts.NotHereError("not here")

    jobs = [
        device_parts.Job("long", lambda: {"seconds": 1.0}, 60),
        device_parts.Job("failing", fail, 1),
        device_parts.Job("impossible", skip, 1),
        device_parts.Job("short", lambda: {"seconds": 2.0}, 5),
    ]
    long, failing, impossible, short = device_report.do("part", jobs, deadline=110.0)
    assert long["skipped"] == "10 s are left, it may take 60"
    assert failing["error"] == "RuntimeError: out of luck"
    assert impossible["skipped"] == "not here"
    assert short["seconds"] == 2.0


def test_a_part_that_dies_leaves_its_rows_and_the_reason(measured, monkeypatch, tmp_path):
    device_report, device_parts = measured
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import json, os, sys\n"
        "path = sys.argv[sys.argv.index('--rows') + 1]\n"
        "open(path, 'w').write(json.dumps({'part': 'p', 'name': 'first', 'seconds': 1.0}) + '\\n')\n"
        "os._exit(7)\n"
    )
    monkeypatch.setattr(device_report, "__file__", str(dying))
    jobs = [device_parts.Job(name, dict, 1) for name in ("first", "second")]
    first, second = device_report.isolated("p", jobs, "cuda", device_report.time.monotonic() + 60)
    assert first["seconds"] == 1.0
    assert "code 7" in second["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "nothing"], "there is no part nothing; there are: ceilings"), (["--seconds", "0"], "must be positive"),
     (["--device", "abacus"], "no such device here")],
)  # fmt: skip
def test_wrong_flags_are_named(measured, capsys, words, message):
    try:
        code = measured[0].main(words)
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err
