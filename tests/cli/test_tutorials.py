"""The pages for scans, satellites and microscopy, run as they stand.

A folder, shards, training that is stopped and goes on, k-NN, fine-tuning, export, timm.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch

from spark_fast.cli import convert, export, train
from spark_fast.cli import eval as evaluation
from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.commands import run_here

ROOT = Path(__file__).parents[2]
PAGES = {"scans": "scans.md", "satellites": "satellites.md", "microscopy": "microscopy.md", "aerial": "scans.md"}
CHANNELS = {"scans": 1, "satellites": 12, "microscopy": 5, "aerial": 4}
MAINS = {
    "spark-fast-convert": convert.main,
    "spark-fast-train": train.main,
    "spark-fast-eval": evaluation.main,
    "spark-fast-export": export.main,
}


def lines_of(kind: str) -> list[list[str]]:
    """The words of the page's commands, the one that makes the images first; of scans, for four channels of 8 bits."""
    text = (ROOT / "docs" / "tutorials" / PAGES[kind]).read_text(encoding="utf-8")
    making = re.search(r"`(python tools/make_bands.py .*?)`", text)[1]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    if kind == "aerial":
        making = making.replace("make_bands.py scans", "make_bands.py aerial")
        block = block.replace("--in_chans 1", "--in_chans 4")
    return [shlex.split(line) for line in [making, *block.splitlines()] if not line.startswith("pip ")]


def run(words: list[str], *more: str, code: int = 0) -> str:
    if words[0] == "python":
        sys.argv = words[1:]
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return ""
    few = ["--workers=1"] if words[0] != "spark-fast-export" else []
    few += ["--threads=1"] if words[0] in ("spark-fast-train", "spark-fast-eval") else []
    return run_here(MAINS[words[0]], *words[1:], *few, *more, code=code).stdout


def test_each_page_goes_the_whole_way():
    for kind in PAGES:
        commands = [words[0].removeprefix("spark-fast-") for words in lines_of(kind)]
        assert commands == ["python", "convert", "train", "eval", "eval", "export"], kind


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind == "satellites" else pytest.param(kind, marks=pytest.mark.drill) for kind in PAGES]
)
def test_from_a_folder_to_fine_tuned_accuracy(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    making, converting, training, knn, finetuning, exporting = lines_of(kind)
    run(making)
    assert "verified" in run(converting)
    shards, name = Path(converting[2]), training[1]
    manifest = read_manifest(shards / "train")
    assert (manifest.count, manifest.in_chans, manifest.refused) == (192, CHANNELS[kind], [])

    run(training, "--max_steps=20", code=75)
    run(training, "--resume=auto")
    kept = torch.load(f"output_{name}/ckpt-last.pth", weights_only=True)
    assert kept["statistics"] == manifest.statistics["percentile"]

    run(knn)
    assert json.loads(Path(f"output_{name}_knn/result.json").read_text())["top1"] > 80
    run(finetuning)
    assert json.loads(Path(f"output_{name}_finetune/result.json").read_text())["top1"] > 90

    told = run(exporting)
    out = exporting[exporting.index("--out") + 1]
    assert f"{out}: " in told
    found = timm.create_model("resnet10t", in_chans=CHANNELS[kind], num_classes=0, checkpoint_path=out)
    assert found(torch.zeros(1, CHANNELS[kind], 64, 64)).shape == (1, 512)
