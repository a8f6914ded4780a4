"""README's table of whole steps is what `train_step.py` measured."""

import shutil

import pytest

from tests.benchmarks.test_device_report import ROOT

ROW = {"model": "resnet50", "batch": 8, "mask": 0.6, "masks": 1, "optimizer": 0.1}
ROWS = [
    ROW | {"method": "spark", "candidate": "masked fp32 NCHW, published decoder", "encoder": 4.0, "step": 9.0},
    ROW | {"method": "spark", "candidate": "masked fp32", "encoder": 3.0, "step": 6.0},
    ROW | {"method": "spark", "candidate": "packed fp32", "encoder": 1.0, "step": 4.5},
    ROW | {"method": "fcmae", "candidate": "masked fp32", "encoder": 3.0, "step": 3.5},
    ROW | {"method": "fcmae", "candidate": "packed fp32", "encoder": 1.0, "step": 1.25},
    ROW | {"method": "fcmae", "candidate": "packed bf16", "encoder": 1.0, "step": 1.0},  # has nothing like it beside it
]
MACHINE = {"device": "a processor", "threads": 2, "torch": "2.14", "date": "2026-12-01", "commit": "abc1234"}


@pytest.fixture
def step_tables():
    import step_tables

    return step_tables


def test_like_is_compared_with_like_and_with_the_published_way(step_tables):
    text = step_tables.headline({"settings": {"size": 224, "repeats": 5}, "machine": MACHINE, "rows": ROWS})
    assert text.splitlines()[2:4] == [
        "| SparK | resnet50 | 0.6 | fp32 | 3.00 to 1.00 s, **3.00x** | 6.00 to 4.50 s, **1.33x** | 2.00x |",
        "| FCMAE | resnet50 | 0.6 | fp32 | 3.00 to 1.00 s, **3.00x** | 3.50 to 1.25 s, **2.80x** | 7.20x |",
    ]
    assert "2 threads of a processor,\ntorch 2.14, 2026-12-01, commit abc1234" in text


def test_readme_has_the_table_of_the_kept_result(step_tables, tmp_path):
    shutil.copy(ROOT / "README.md", page := tmp_path / "README.md")
    step_tables.main(page)
    assert page.read_text() == (ROOT / "README.md").read_text(), "python benchmarks/step_tables.py writes it"
