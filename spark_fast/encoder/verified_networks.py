"""The networks of timm that `benchmarks/sweep_timm.py` has packed and verified, by version of timm."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import timm

UNVERIFIED_KWARGS = {"drop_path_rate", "drop_rate", "pretrained"}  # these change no layer's kind


@cache
def sweep_results(version: str = timm.__version__) -> dict[str, dict[str, float | str]]:
    """What the sweep found, for a version of timm; both parts are empty if it was not swept.

    Returns:
        {"verified": {name: largest relative difference}, "refused": {name: reason}}.
    """
    path = files("spark_fast") / "sweeps" / f"timm-{version}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"verified": {}, "refused": {}}


def is_verified(model: str, kwargs: dict | None = None, stages: int | None = None, in_chans: int = 3) -> bool:
    """Has the sweep verified just this network, with the timm that is installed? It was of images of three channels."""
    others = set(kwargs or {}) - UNVERIFIED_KWARGS
    return model in sweep_results()["verified"] and stages is None and in_chans == 3 and not others
