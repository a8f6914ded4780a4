"""What the converter makes of real images is trained on by every backend, with the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spark_fast.cli import convert
from tests.cli.tiny_run import TINY, here
from tests.commands import run_here
from tests.optional import missing

OPTIONAL = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("dali", "ffcv")]
TOLERANCE = {"torch": 0, "dali": 1e-3, "ffcv": 1e-2}  # relative; resizing rounds otherwise, FFCV's DCT is rougher


@pytest.fixture(scope="module")
def trained(imagenet_sample: Path, tmp_path_factory: pytest.TempPathFactory):
    """backend -> losses of three steps over the same conversion."""
    place = tmp_path_factory.mktemp("trained")
    form = "shards" if missing("ffcv") else "both"
    run_here(convert.main, imagenet_sample, place / "data", "--workers", 1, "--format", form, "--verify")
    losses: dict[str, list[float]] = {}

    def run(backend: str) -> list[float]:
        if backend not in losses:
            flags = [f"--data_path={place / 'data'}", f"--pipeline={backend}", *TINY, "--model=test_resnet", "--bs=16"]
            ends = ["--ep=1", "--max_steps=3", "--log_every=1", "--picture_every=0", f"--exp_dir={place / backend}"]
            here("name", *flags, *ends, code=75)
            rows = (place / backend / "metrics.jsonl").read_text().splitlines()
            losses[backend] = [json.loads(row)["loss"] for row in rows]
        return losses[backend]

    return run


@pytest.mark.parametrize("backend", ["torch", "synthetic", *OPTIONAL])
def test_every_backend_trains_on_a_conversion_of_real_images(trained, backend):
    losses = trained(backend)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    if backend in TOLERANCE:
        np.testing.assert_allclose(losses, trained("torch"), rtol=TOLERANCE[backend])
