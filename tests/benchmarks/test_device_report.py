"""The report of a GPU, as a smoke test on the CPU: every part runs or says why not, and a failure is only its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_runs_without_a_gpu_or_says_why_not(tmp_path):
    done = report(tmp_path, "--name", "smoke")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kept = json.loads((tmp_path / "smoke.json").read_text())
    assert kept["smoke_test"]
    assert kept["versions"]["torch"]
    assert kept["machine"]["device"]
    assert [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()] == kept["rows"]
    rows = {(row["part"], row["name"]): row for row in kept["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    reasons = {row["skipped"] for row in rows.values() if "skipped" in row}
    assert {"takes a GPU", "the smoke test does not compile"} <= reasons
    for row in rows.values():
        assert all(
            v > 0
            for k, v in row.items()
            if k in ("images/s", "MFU", "GB/s", "TFLOP/s", "seconds", "host seconds", "peak GiB")
        )
    equal = [row for (part, _), row in rows.items() if part == "packed = masked"]
    assert len(equal) == 4
    assert all(0 < row["packed gradient off by"] < 1e-4 for row in equal if "fp32" in row["name"])
    assert 0 <= rows["loader", "end to end, decode on host"]["data wait"] < 1
    assert "no simplejpeg" in rows["loader", "decode on host, augment on host"]["note"]
    assert "no plot: matplotlib is not installed" in done.stdout


def written(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def measured():
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
    file = tmp_path / "rows.jsonl"
    first, second = device_report.isolated("p", jobs, "cuda", device_report.time.monotonic() + 60, file)
    assert first["seconds"] == 1.0
    assert "code 7" in second["error"]
    assert written(file) == [first, second]


def test_a_row_is_on_disk_before_the_next_one_is_measured(measured, tmp_path):
    device_report, device_parts = measured
    file = tmp_path / "rows.jsonl"
    jobs = [
        device_parts.Job("first", lambda: {"seconds": 1.0}, 0),
        device_parts.Job("second", lambda: {"before": [row["name"] for row in written(file)]}, 0),
    ]
    rows = device_report.measure("part", jobs, device_report.time.monotonic() + 60, file)
    assert rows[1]["before"] == ["first"]
    assert written(file) == rows
    assert 0 < rows[0]["at"] <= rows[1]["at"]


def test_the_first_step_comes_within_thirty_seconds_and_convnext_not_last(measured, tmp_path):
    device_report, device_parts = measured
    parts = device_parts.all_parts(device_report.FULL, torch.device("cuda"), tmp_path)
    jobs = [(part, job) for part, jobs in parts.items() for job in jobs]
    first = next(i for i, (part, _) in enumerate(jobs) if part.startswith("step"))
    assert sum(job.needs for _, job in jobs[: first + 1]) <= 20, "the rest is for two imports of torch"
    assert jobs[first][0] == "step resnet50 224"
    assert list(parts).index("step convnext_small 224") < list(parts).index("encoder")


@pytest.fixture
def asked(measured, monkeypatch):
    """What the part with the GPU's tests would run; pytest passes."""
    asked = []

    def run(command, stdout, env, **_):
        asked.append((command, env))
        stdout.write("...\n130 passed in 40 s\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measured[1].subprocess, "run", run)
    return asked


def test_the_tests_that_need_a_gpu_are_run_by_eight_processes(measured, asked, tmp_path):
    _, device_parts = measured
    assert device_parts._gpu_tests(torch.device("cuda"), tmp_path) == {
        "pytest": "130 passed in 40 s", "output": "gpu_tests.log",
    }  # fmt: skip
    [(command, environment)] = asked
    assert command[command.index("-n") + 1] == "8"
    assert {word for word in command if word.endswith(".py")} == set(device_parts.GPU_TESTS)
    assert all((ROOT / path).is_file() for path in device_parts.GPU_TESTS)
    assert "PYTEST_PLUGINS" not in environment


@pytest.mark.drill
def test_the_tests_that_need_a_gpu_are_collected_without_simplejpeg(measured, asked, tmp_path, monkeypatch):
    _, device_parts = measured
    monkeypatch.setattr(device_parts, "find_spec", lambda name: None if name == "simplejpeg" else True)
    device_parts._gpu_tests(torch.device("cuda"), tmp_path)
    [(_, environment)] = asked
    (tmp_path / "test_it.py").write_text("import simplejpeg\n\ndef test_it(): assert simplejpeg.decode_jpeg\n")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "simplejpeg.py").write_text("raise ImportError('not installed')\n")
    environment["PYTHONPATH"] = f"{hidden}:{environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", str(tmp_path / "test_it.py")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    told, _ = process.communicate()
    assert "1 passed" in told, told


def test_without_git_the_commit_is_left_out(measured, monkeypatch, tmp_path):
    import measuring

    monkeypatch.setenv("PATH", str(tmp_path))
    assert measuring.machine(torch.device("cpu"), 1)["commit"] == ""


def test_parts_are_chosen_by_pattern_and_written_where_asked(measured, tmp_path, monkeypatch, capsys):
    device_report, device_parts = measured
    names = ("step a 224", "compiled step a 224", "loader")
    parts = {name: [device_parts.Job("row", lambda: {"seconds": 1.0}, 0)] for name in names}
    monkeypatch.setattr(device_report, "all_parts", lambda *_: parts)
    words = ["--device", "cpu", "--threads", str(torch.get_num_threads()), "--only", "step *", "--only", "loader"]
    assert device_report.main([*words, "--rows", str(tmp_path / "new" / "rows.jsonl")]) == 0
    assert [row["part"] for row in written(tmp_path / "new" / "rows.jsonl")] == ["step a 224", "loader"]
    assert device_report.main([*words, "--out", str(tmp_path / "other"), "--name", "named"]) == 0
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"named.jsonl", "named.json"}
    assert "2 rows, 0 skipped, 0 failed" in capsys.readouterr().out


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


def test_the_end_of_the_decoder_is_measured_as_one_operator_where_there_are_kernels(measured):
    import device_layers
    from ways import Shape

    row = device_layers._end(Shape("resnet10t", 64, 0.6, 2, width=32), 1, torch.device("cpu"))
    assert row["chosen"] == "apart"
    assert row["apart ms"] > 0
    assert "one ms" not in row


def test_batch_norms_are_measured_at_every_size_and_the_constant_that_fits_is_printed(measured):
    import device_layers
    from device_jobs import TINY

    row = device_layers._norms(TINY, torch.device("cpu"))
    assert row["chosen"] == "pytorch"
    assert len(row["sizes"]) == len(TINY.norms)
    assert row["pytorch ms"] == sum(size["pytorch"] for size in row["sizes"].values())
    faster, slower = {"kernels": 1.0, "pytorch": 2.0}, {"kernels": 2.0, "pytorch": 1.0}

    def fitted(*sizes):
        return device_layers.least_elements({"elements": elements, **ms} for elements, ms in sizes)

    assert fitted((200, slower), (100, faster), (400, faster), (300, faster)) == 300
    assert fitted((100, faster), (200, faster)) == 100
    assert fitted((200, slower), (200, faster), (100, faster)) is None
