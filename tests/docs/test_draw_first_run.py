"""The tutorial of a first run goes the whole way in a short form, and its code reads what it exports."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from docs.generate.draw_first_run import PAGE, PICTURES, commands, started
from spark_fast.cli import convert, export, plot, reconstruct, train
from tests.commands import run_here

MAINS = {
    "spark-fast-convert": convert.main,
    "spark-fast-train": train.main,
    "spark-fast-reconstruct": reconstruct.main,
    "spark-fast-plot": plot.main,
    "spark-fast-export": export.main,
}
SHORTER = {"--train": "48", "--val": "16", "--ep": "5", "--eval_every": "5", "--decoder_width": "32"}


def short(words):
    return [SHORTER.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def test_the_page_goes_from_images_to_weights():
    names = [words[0].removeprefix("spark-fast-") for words in commands()]
    assert names == ["python", "convert", "train", "reconstruct", "plot", "export"]
    assert all(picture.is_file() for picture in PICTURES.values())


def test_a_command_is_started_from_the_checkout():
    words = started(["spark-fast-train", "first", "--bs", "32"])
    assert words == [sys.executable, "-m", "spark_fast.cli.train", "first", "--bs", "32", "--resume=auto"]


@pytest.mark.slow
def test_every_command_runs_and_the_weights_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in map(short, commands()):
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", [*words[1:], "--size=48", "--workers=1"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(PAGE.parents[2] / words[1]), run_name="__main__")
            assert not ended.value.code
        else:
            more = {"spark-fast-convert": ["--workers=1"], "spark-fast-train": ["--workers=1", "--threads=1"]}
            run_here(MAINS[words[0]], *words[1:], *more.get(words[0], []))
    rows = [json.loads(line) for line in Path("output_first/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "knn_top1" in row] == [0, 5]
    assert Image.open("grid.png").size[0] > 3 * 64
    assert Image.open("curves.png").size[0] > 300
    Image.new("RGB", (90, 70)).save("photo.jpg")
    code = re.search(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["features"].shape == (1, 256, 4, 4)
