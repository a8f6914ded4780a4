"""The command as a person runs it: exit codes, messages, and what is left on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from spark_fast.cli.convert import Display, main
from spark_fast.commands import command as command_name
from spark_fast.errors import DataError
from spark_fast.pipelines.convert.conversion import ConvertSettings, Progress, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.sources.detect import TARS, detect_source
from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.commands import HANG_SECONDS, run_here
from tests.pipelines.convert.test_conversion import contents
from tests.pipelines.tars import tar_of, tar_of_tars

TOOL = Path(__file__).parents[2] / "tools" / "convert_imagenet.py"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """40 images of noise (slow to encode) in an ImageNet layout."""
    random = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "src" / ("val" if i % 8 == 7 else "train") / f"n{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = random.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        (folder / f"{i}.JPEG").write_bytes(simplejpeg.encode_jpeg(noise, 90))
    return tmp_path / "src"


def command(src: Path, dst: Path, *options: str) -> list[str]:
    fixed = ["--images_per_shard", "5", "--short_side", "200"]
    return [sys.executable, str(TOOL), str(src), str(dst), *fixed, *options]


def run(src: Path, dst: Path, *options: str, **popen: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        command(src, dst, *options), capture_output=True, text=True, timeout=HANG_SECONDS, check=False, **popen
    )


def here(src: Path, dst: Path, *options: str, code: int) -> SimpleNamespace:
    """`run` in this process."""
    return run_here(main, *command(src, dst, *options)[2:], code=code)


def convert_here(src: Path, dst: Path) -> None:
    """What `command` does, without the seconds that a new interpreter takes."""
    convert(src, dst, ConvertSettings(Reencode(short_side=200), images_per_shard=5))


def test_the_help_of_a_setting_has_one_default() -> None:
    words = " ".join(run_here(main, "--help").stdout.replace("│", " ").split())
    about = words[words.index("--short_side INT") : words.index("--max_side")]
    assert (
        about.strip()
        == "--short_side INT Reduce larger images to this shorter side; 0 keeps their size. (default: 256)"
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_of_tars_killed_at_random_moments_merge_to_the_same_bytes(src, tmp_path, seed):
    convert_here(src, tmp_path / "whole")
    tars, dst = tmp_path / "tars", tmp_path / "out"
    tars.mkdir()
    for split in ("train", "val"):
        (tars / f"ILSVRC2012_img_{split}.tar").write_bytes(tar_of_tars(src / split))
    pauses = np.random.default_rng(seed).uniform(0, 0.15, 2)
    for pause in pauses:
        process = subprocess.Popen(
            command(tars, dst, "--part", "2/2", "--workers", "2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        wait_for(lambda: list(dst.glob("train/*.tar*")), process)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    ended = run(tars, dst, "--part", "2/2", "--workers", "2")
    assert ended.returncode == 0, ended.stderr
    assert "val: part 2/2 is done" in ended.stdout
    assert "val: part 1/2 is done" in here(tars, dst, "--part", "1/2", "--workers", "1", code=0).stdout
    merged = run_here(main, dst, "--merge", "--verify", code=0)
    assert "train: 35 images in 7 shards" in merged.stdout
    assert "verified: every shard" in merged.stdout
    assert contents(dst) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_it_reports_progress_result_and_verification_in_plain_lines(src, tmp_path):
    (src / "train" / "n0" / "0.JPEG").write_bytes(b"")
    ended = run(src, tmp_path / "out", "--verify", "--workers", "1")
    assert ended.returncode == 0, ended.stderr
    assert "train: 35/35 images," in ended.stdout
    assert "images/s" in ended.stdout
    assert "MB/s" in ended.stdout
    assert "train: 34 images in 7 shards" in ended.stdout
    assert "1 left out as unreadable" in ended.stdout
    assert "val: 5 images in 1 shards" in ended.stdout
    assert "verified: every shard" in ended.stdout
    assert "\x1b" not in ended.stdout


def test_an_image_above_the_limit_is_left_out_and_read_as_the_reason_says(tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("a", (40, 30)), ("scene", (1500, 1000))):
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / "in" / f"{name}.jpg")
    refusing = run_here(main, tmp_path / "in", tmp_path / "out", "--workers", "1", "--max_pixels", "1", code=0)
    assert "1 images in 1 shards" in refusing.stdout
    (refused,) = read_manifest(tmp_path / "out").refused
    assert refused["reason"] == (
        "1500 x 1000 pixels exceed the limit of 1 million: --max_pixels 2 (train, eval, convert) reads it, see"
        " docs/how_to/your_own_data.md"
    )
    raised = ["--workers", "1", "--max_pixels", "2", "--overwrite", "--verify"]
    assert "2 images in 1 shards" in run_here(main, tmp_path / "in", tmp_path / "out", *raised, code=0).stdout


@pytest.mark.slow
def test_a_flipped_byte_is_found_by_verify(src, tmp_path):
    convert_here(src, tmp_path / "out")
    shard = tmp_path / "out" / "train" / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    ended = run(src, tmp_path / "out", "--verify")
    assert ended.returncode == 3
    assert "train/shard-000002.tar, record at byte 512" in ended.stderr
    assert "checksum differs" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_tars_train_after_the_command_that_their_refusal_names(src, tmp_path):
    tars, dst = tmp_path / "tars", tmp_path / "out"
    tars.mkdir()
    (tars / TARS["train"]).write_bytes(tar_of_tars(src / "train"))
    (tars / TARS["val"]).write_bytes(tar_of({path.name: path.read_bytes() for path in (src / "val").rglob("*.JPEG")}))
    with pytest.raises(DataError, match=f"as downloaded .* Convert once: {command_name('convert')} {tars} DST"):
        detect_source(tars)
    ended = run(tars, dst)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert (
        f"WARNING: {tars / TARS['val']} has no class names, so its images are converted without labels" in ended.stderr
    )
    assert len(detect_source(dst)) == 35


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_leaves_whole_shards_and_says_how_to_go_on(src, tmp_path, workers):
    dst = tmp_path / "out"
    process = subprocess.Popen(
        command(src, dst, "--workers", workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: list(dst.glob("train/*.json")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, stderr = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    assert stderr == "convert_imagenet.py: interrupted. Finished shards are kept: the same command continues.\n"
    left = [path.name for path in dst.rglob("*") if path.is_file()]
    assert not any(name.endswith(".partial") or name == "manifest.json" for name in left)
    convert_here(src, dst)  # goes on without a complaint


@pytest.mark.slow
def test_a_failing_write_is_exit_code_6(src, tmp_path):
    def limit_file_size() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ended = run(src, tmp_path / "out", "--workers", "1", preexec_fn=limit_file_size)
    assert ended.returncode == 6
    assert "writing to" in ended.stderr
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_side", "300"], "exclude each other"),
        (["--quality", "0"], "quality must be from 1 to 100 (90 is usual), got 0"),
        (["--workers", "-1"], "counts"),
        (["--max_pixels", "0"], "max_pixels must be 1 (million) or more"),
        (["--part", "3/2"], "such as 2/4 for the second of four; got '3/2'"),
        (["--part", "1/2", "--overwrite"], "--part does not work with --overwrite"),
        (["--merge"], "--merge takes only the folder of the parts"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_senseless_settings_are_exit_code_2(src, tmp_path, options, message):
    ended = here(src, tmp_path / "out", *options, code=2)
    assert message in ended.stderr + ended.stdout
    assert not (tmp_path / "out").exists()


def test_bad_sources_are_exit_code_3_and_bad_destinations_2(src, tmp_path):
    missing = here(tmp_path / "nothing", tmp_path / "out", code=3)
    assert missing.stderr.count("\n") == 1
    assert "nothing does not exist" in missing.stderr
    unmerged = run_here(main, tmp_path / "nothing", "--merge", code=3)
    assert unmerged.stderr.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert "no images in" in here(tmp_path / "empty", tmp_path / "out", code=3).stderr
    assert "into the folder of the images" in here(src, src / "out", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_brackets_in_a_folders_name_are_shown_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with Display() as display:
        display.show(Progress(Path("o[red]"), 3, 3, 99))
    assert "o[red]" in capsys.readouterr().out
