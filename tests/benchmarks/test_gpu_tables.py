"""What a GPU gave gets into the pages; what it did not give is said to be not measured."""

import json
import shutil

import pytest

from tests.benchmarks.test_device_report import BENCHMARKS, ROOT

MACHINE = {
    "part": "ceilings", "name": "machine", "device": "NVIDIA H200", "torch": "2.11.0", "python": "3.12.3",
    "commit": "abc1234", "date": "2026-12-01", "smoke_test": False,
}  # fmt: skip
STEP = {"batch": 256, "seconds": 0.0625, "host seconds": 0.05, "MFU": 0.4, "peak GiB": 14.5}
ROWS = [
    MACHINE,
    {"step": "ceilings", "code": 0, "took": 11, "limit": 20},
    {"part": "step resnet50 224", "name": "packed Triton", "images/s": 1.0} | STEP,
    {"part": "step resnet50 224", "name": "packed Triton", "images/s": 4096.0} | STEP,  # measured once more
    {"part": "step resnet50 224", "name": "masked", "images/s": 2048.0} | STEP,
    {"part": "step resnet50 224", "name": "published", "images/s": 1024.0} | STEP,
    {"part": "step resnet50 224", "name": "packed eager", "error": "RuntimeError: a | b\nc"},
    {"part": "layers", "name": "decoder block 0", "chosen": "apart", "merged ms": 0.5, "apart ms": 0.75},
]


@pytest.fixture
def gpu_tables(monkeypatch, tmp_path):
    import gpu_tables

    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path / "results")
    return gpu_tables


@pytest.fixture
def pages(tmp_path):
    (tmp_path / "docs" / "explanation").mkdir(parents=True)
    for page in ("README.md", "docs/explanation/gpu.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def report(folder, rows, end=""):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return file


def test_the_pages_say_what_was_measured_and_what_was_not(gpu_tables, pages):
    cut_off = report(pages, ROWS, '{"part": "layers", "na')
    assert gpu_tables.main([str(cut_off), "--root", str(pages)]) == 0
    readme, page = ((pages / name).read_text() for name in ("README.md", "docs/explanation/gpu.md"))
    assert "| resnet50 | 256 | 4096 | 2048 | **2.00x** | 1024 | **4.00x** |" in readme
    assert "| convnext_small | 128 | not measured | not measured | not measured | not measured |" in readme
    for text in (readme, page):
        assert "NVIDIA H200, torch 2.11.0, Python 3.12.3, commit abc1234, 2026-12-01." in text
    assert "| step resnet50 224 | packed Triton | 256 | 4096 | 62.5 | 50.0 | 40.0% | 14.5 |" in page
    assert "| step resnet50 224 | packed eager | error: RuntimeError: a / b c |" in page
    assert "| compiled step resnet50 224 | packed compiled | not measured |" in page
    assert "| layers | decoder block 0 | apart | 0.750 | merged | 0.500 |" in page
    assert "Loader: not measured." in page
    assert "## The report" in page


def test_the_pages_of_this_checkout_are_what_it_writes(gpu_tables, pages, monkeypatch):
    monkeypatch.setattr(gpu_tables, "RESULTS", BENCHMARKS / "results")
    before = [(pages / name).read_text() for name in ("README.md", "docs/explanation/gpu.md")]
    assert gpu_tables.main(["--root", str(pages)]) == 0
    assert [(pages / name).read_text() for name in ("README.md", "docs/explanation/gpu.md")] == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [([MACHINE | {"smoke_test": True}], "a rehearsal on NVIDIA H200"), (ROWS[1:], "no row of the machine")],
)
def test_what_no_gpu_gave_is_refused(gpu_tables, pages, capsys, rows, message):
    before = (pages / "README.md").read_text()
    assert gpu_tables.main([str(report(pages, rows)), "--root", str(pages)]) == 2
    assert message in capsys.readouterr().err
    assert (pages / "README.md").read_text() == before


def test_a_broken_line_within_a_report_is_named(gpu_tables, pages, capsys):
    file = report(pages, ROWS[:1], "{\n" + json.dumps(ROWS[2]) + "\n")
    assert gpu_tables.main([str(file), "--root", str(pages)]) == 2
    assert "line 2: no row of a report" in capsys.readouterr().err
