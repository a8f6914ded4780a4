from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    """By their own names, as they import each other."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
