"""The networks of timm that `benchmarks/sweep_timm.py` has packed and verified, by version of timm."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import timm

UNVERIFIED_KWARGS = {"drop_path_rate", "drop_rate", "pretrained"}  # these change no layer's kind


@cache
def table(version: str = timm.__version__) -> dict[str, dict[str, Any]]:
    """{"proven": {name: largest difference}, "refused": {name: reason}} for a version of timm; empty if not swept."""
    path = files("spark_fast") / "sweeps" / f"timm-{version}.json"
    return json.loads(path.read_text()) if path.is_file() else {"proven": {}, "refused": {}}


def is_proven(model: str, kwargs: dict | None = None, stages: int | None = None) -> bool:
    """Has the sweep verified just this network, with the timm that is installed?"""
    return model in table()["proven"] and stages is None and not set(kwargs or {}) - UNVERIFIED_KWARGS
