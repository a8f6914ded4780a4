"""Images of any channels and numbers, by commands alone: trained, resumed and evaluated by the same statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spark_fast.cli import eval as evaluation
from spark_fast.cli import train
from spark_fast.pipelines import LoaderOptions
from spark_fast.pipelines.build import measure_statistics
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from tests.cli.tiny_run import TINY, assert_same_weights
from tests.commands import run_here
from tests.pipelines.bands import SETS as SETS_OF_FILES
from tests.pipelines.bands import bands, png_of

SETS = {**SETS_OF_FILES, "3 x 16 bit": (3, "uint16", ".png", png_of)}
FLAGS = [*[word for word in TINY if not word.startswith("--model")], "--model=test_resnet", "--bs=8", "--ep=2"]


def folder_of(root: Path, kind: str) -> Path:
    """train/ and val/ with two classes: the second is brighter in its first channel."""
    channels, dtype, ending, encode = SETS[kind]
    for i in range(32):
        pixels = bands(i, 70, 80, channels, dtype)
        pixels[:, :, 0] = pixels[:, :, 0] // 2 if i % 2 else pixels[:, :, 0]
        path = root / ("train" if i < 24 else "val") / f"class{i % 2}" / f"{i:03d}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    return root


def kept(folder: Path) -> Statistics:
    return Statistics.from_dict(torch.load(folder / "ckpt-last.pth", weights_only=True)["statistics"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [k if k in ("12 x 16 bit", "3 x 16 bit") else pytest.param(k, marks=pytest.mark.drill) for k in SETS]
)
def test_a_run_is_resumed_and_evaluated_by_the_statistics_that_it_measured(tmp_path, kind):
    channels, data = SETS[kind][0], folder_of(tmp_path / "data", kind)
    flags = [f"--data_path={data}", *FLAGS, f"--in_chans={channels}", "--scale=percentile", "--rot90", "--vflip"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_here(train.main, "a", *flags, f"--exp_dir={whole}")
    known = measure_statistics(data, LoaderOptions(8, in_chans=channels, scaling="percentile"))
    assert kept(whole) == known
    first = run_here(train.main, "a", *flags, f"--exp_dir={parted}", "--max_steps=2", code=75)
    assert first.stderr.count("measured on 24 images") == 1
    again = run_here(train.main, "a", *flags, f"--exp_dir={parted}", "--resume=auto")
    assert "measured on" not in again.stderr
    assert kept(parted) == known
    assert_same_weights(whole, parted)

    words = [f"--data_path={data}", "--input_size=64", f"--weights={whole}", "--bs=8", "--k=3", "--workers=2"]
    found = run_here(evaluation.main, "knn", "a", *words, f"--exp_dir={tmp_path / 'knn'}")
    assert "measured on" not in found.stderr
    assert json.loads((tmp_path / "knn" / "result.json").read_text())["images"] == 8
    if channels == 3:  # which were no photographs to the run
        words = [word for word in words if not word.startswith("--k=")] + ["--ep=1", "--wp_ep=0", "--ema=0"]
        run_here(evaluation.main, "finetune", "a", *words, f"--exp_dir={tmp_path / 'tuned'}")
        settings = json.loads((tmp_path / "tuned" / "result.json").read_text())["settings"]
        assert settings["recipe"]["augment"] == "none"


def test_files_of_other_channels_end_the_command_with_exit_code_3(tmp_path):
    data = folder_of(tmp_path / "data", "4 x 8 bit")
    flags = ["a", f"--data_path={data}", *FLAGS, "--in_chans=5", f"--exp_dir={tmp_path / 'run'}"]
    assert "it has 4 channels where --in_chans is 5" in run_here(train.main, *flags, code=3).stderr
    assert not (tmp_path / "run").exists()
