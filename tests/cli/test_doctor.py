"""spark-fast-doctor says what is there, what is missing, and what to do."""

import importlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import simplejpeg
import torch
import tyro

from spark_fast.cli import doctor
from spark_fast.errors import SettingsError, SparkFastError
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.sources.remote import server
from tests.pipelines.pictures import jpeg
from tests.pipelines.sources.ten_images import write_all

TOOL = Path(__file__).parents[2] / "tools" / "doctor.py"


def run(capsys, *flags):
    code = tyro.cli(doctor.doctor, args=[*map(str, flags)])
    return code, " ".join(capsys.readouterr().out.split())


def test_a_machine_that_can_train(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    code, told = run(capsys, "--data_path", tmp_path, "--exp_dir", tmp_path / "not" / "yet", "--workers", 1)
    assert code == 0
    expected_words = ("torch", "timm", "GPU", "open files", "GiB free", "many small files", "training can run here")
    for expected in (*expected_words, "decoding", "resizing", "images/s, limited by"):
        assert expected in told
    assert [path.name for path in tmp_path.iterdir()] == ["images"], "the probe of the disk is gone"


def test_a_missing_and_an_old_package_are_needed(monkeypatch, capsys, tmp_path):
    def version(name):
        if name == "timm":
            raise PackageNotFoundError(name)
        return "2.1.0" if name == "torch" else "99.0"

    monkeypatch.setattr(doctor, "version", version)
    code, told = run(capsys, "--exp_dir", tmp_path)
    assert code == 1
    assert "missing: torch, timm" in told
    assert "pip install 'timm>=" in told


def test_an_optional_part_that_is_broken_is_told_from_one_that_is_absent(monkeypatch):
    def load(name):
        if name == "ffcv":
            raise OSError("libturbojpeg.so.0: cannot open shared object file")
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(importlib, "import_module", load)
    found = {finding.what: finding for finding in doctor.optional_parts()}
    assert found["ffcv"].found.startswith("cannot be imported: libturbojpeg")
    assert found["wandb"].found == "not installed"
    assert not any(finding.needed for finding in found.values())
    assert "spark-fast[wandb]" in found["wandb"].advice


def test_what_to_do_is_a_line_that_can_be_copied_whole(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "40")
    hint = f"pip install {'spark-fast[nothing] ' * 20}".strip()
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_module": ("nothing", hint)})
    doctor.doctor(exp_dir=tmp_path)
    assert f"no_such_module: for nothing: {hint}" in capsys.readouterr().out.splitlines()


def test_the_table_keeps_what_stands_in_brackets(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_module": ("nothing", "pip install 'spark-fast[nothing]'")})
    _, told = run(capsys, "--exp_dir", tmp_path)
    assert "spark-fast[nothing]" in told


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'torch'", name="torch"), OSError("libcudart.so")]
)
def test_without_torch_the_table_is_shown_all_the_same(monkeypatch, capsys, tmp_path, error):
    load = importlib.import_module

    def without_torch(name):
        if name == "torch":
            raise error
        return load(name)

    monkeypatch.setattr(importlib, "import_module", without_torch)
    code, told = run(capsys, "--exp_dir", tmp_path)
    assert code == 1
    assert "missing: importing torch" in told
    assert "shared memory" in told


def test_decoders_are_tried(monkeypatch):
    found = {finding.what: finding for finding in doctor.decoders()}
    assert found["libjpeg-turbo"].found == "decodes"

    def refuse(*_):
        raise ValueError("no such codec")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    found = {finding.what: finding for finding in doctor.decoders()}
    assert found["libjpeg-turbo"].needed
    assert "no such codec" in found["libjpeg-turbo"].found


def test_a_gpu_whose_torchvision_lacks_nvjpeg_can_still_train(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this GPU may have nvJPEG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    nvjpeg = {finding.what: finding for finding in doctor.decoders()}["nvJPEG"]
    assert "--decode device" in nvjpeg.advice
    assert not nvjpeg.needed


def test_little_shared_memory_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    sizes = [64 * 2**20, 2**30]
    usage = namedtuple("usage", "total")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(sizes.pop(0)))
    small, enough = ({finding.what: finding for finding in doctor.limits()}["shared memory"] for _ in range(2))
    assert (small.found, enough.found) == ("64 MiB", "1024 MiB")
    assert "--shm-size" in small.advice
    assert not enough.advice


def test_images_of_which_none_can_be_read_are_a_fault(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(bytes(1000))
    code, told = run(capsys, "--data_path", tmp_path, "--exp_dir", tmp_path)
    assert code == 1
    assert "none of 1 images" in told


def found_at(data_path, **asked):
    return list(doctor.images_at(str(data_path), input_size=32, workers=1, **asked))


def test_a_file_list_is_read_as_the_trainer_reads_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "list.csv").write_text("path,label\na.jpg,1\n")
    files, _, loader = found_at(tmp_path / "list.csv")
    assert files.rate > 0
    assert "many small files" in files.advice
    assert "images/s, limited by" in loader.found
    (tmp_path / "a.jpg").unlink()
    (finding,) = found_at(tmp_path / "list.csv")
    assert finding.needed
    assert "do not exist" in finding.found


def test_shards_on_a_server_are_measured_through_the_cache(tmp_path):
    pytest.importorskip("fsspec")
    url, cache = f"file://{write_all(tmp_path / 'shards')}", str(tmp_path / "cache")
    shards, _, loader = found_at(url, cache_dir=cache)
    assert shards.what == f"shards at {url}"
    assert shards.found.endswith(f"MB/s into the cache {cache}, 3 shards")
    assert shards.rate > 0
    assert "images/s, limited by" in loader.found
    shards, *_ = found_at(url, cache_dir=cache)
    assert (shards.found, shards.rate) == (f"the first 3 are in the cache {cache} already", 0)
    (shards,) = found_at(url, cache_dir=cache, cache_size="9kB")
    assert shards.needed
    assert "more than --cache_size 9kB" in shards.found


def test_a_server_that_is_gone_is_a_fault_and_a_password_is_not_repeated(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setattr(server, "PAUSES", (0.0,) * 2)
    (shards,) = found_at(f"file://{tmp_path}/gone")
    assert shards.needed
    assert "cannot be read after 3 attempts" in shards.found
    with pytest.raises(SettingsError, match="user, password or query") as caught:
        found_at("s3://me:secret@bucket/shards")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "why"), [("nothing", "nothing to read"), ("gone", "there is no such file or folder")]
)
def test_no_images_is_a_fault(tmp_path, folder, why):
    (tmp_path / "nothing").mkdir()
    finding = doctor.read_from(tmp_path / folder)
    assert (finding.needed, finding.found) == (True, why)


def test_a_pipe_is_not_waited_for_and_files_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    finding = doctor.read_from(tmp_path)
    assert finding.rate > 0
    assert f"not read, 1: the first is {tmp_path / 'itself.jpg'} (Too many levels" in finding.found


@pytest.mark.parametrize("words", [("--input_size", "0"), ("--workers", "-1")])
def test_numbers_that_make_no_sense_are_named(capsys, words):
    assert doctor.main(list(words)) == 2
    assert f"{words[0]} must" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    finding = doctor.written_to(tmp_path)
    assert finding.needed
    assert "Permission denied" in finding.found


def test_the_command_for_ffcv_is_the_pipelines_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(SparkFastError) as caught:
        require_ffcv("--pipeline ffcv")
    assert doctor.OPTIONAL["ffcv"][1] in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "error", "missing"),
    [
        ("torch", "ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "importing torch"),
        ("torch", "OSError('libcudart.so.13: cannot open shared object file')", "importing torch"),
        ("torchvision", "RuntimeError('operator torchvision::nms does not exist')", "importing torchvision"),
        ("numpy", "ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')", "libjpeg-turbo"),
    ],
)
def test_the_command_itself_needs_none_of_what_it_looks_for(tmp_path, package, error, missing):
    (tmp_path / f"{package}.py").write_text(f"raise {error}\n")
    words = [sys.executable, str(TOOL), "--exp_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("missing: ")
    assert missing in done.stdout.splitlines()[-1]
    assert done.returncode == 1
