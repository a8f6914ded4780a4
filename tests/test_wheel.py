"""The wheel, installed in an environment of its own, used in a folder that holds a package `pipelines` of the user's.

The new environment sees the packages of the one that runs the tests by a .pth file, and no checkout.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spark_fast

ROOT = Path(__file__).parents[1]
COMMANDS = [f"spark-fast-{name}" for name in ("train", "eval", "convert", "export", "reconstruct", "plot", "doctor")]

pytestmark = pytest.mark.slow


def run(*words, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, capture_output=True, text=True, env={**environment, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources: an earlier build's leftovers in the checkout are no part of it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("spark_fast", "pipelines", "configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder / "dist", folder, cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The folder of the programs of an environment that the wheel is installed in."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=venv.parent)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "theirs.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # read last: the wheel's own come first
    return venv / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project of somebody's with a package `pipelines`, and a few images."""
    place = tmp_path_factory.mktemp("project")
    (place / "pipelines").mkdir()
    (place / "pipelines" / "__init__.py").write_text("raise ImportError('the user has other things in here')\n")
    random = np.random.default_rng(0)
    for i in range(16):
        folder = place / "images" / "train" / f"n{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")
    return place


def test_the_wheel_holds_the_pipelines_in_the_package_and_nowhere_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {Path(name) for name in file.namelist()}
        sizes = {Path(info.filename): info.file_size for info in file.infolist()}
    sources = {path.relative_to(ROOT) for path in ROOT.glob("spark_fast/**/*.py")}
    sources |= {Path("spark_fast") / path.relative_to(ROOT) for path in ROOT.glob("pipelines/**/*.py")}
    assert len(sources) > 60
    assert sources <= held
    assert all(sizes[path] == (ROOT / path).stat().st_size for path in sources)
    assert Path("spark_fast/py.typed") in held
    assert {path.relative_to(ROOT) for path in ROOT.glob("spark_fast/sweeps/*.json")} <= held
    assert {Path("spark_fast") / path.relative_to(ROOT) for path in ROOT.glob("configs/*/*.toml")} <= held
    assert {path.parts[0] for path in held if not path.parts[0].endswith(".dist-info")} == {"spark_fast"}


def test_it_is_imported_from_where_it_was_installed(programs, place):
    script = "import spark_fast.pipelines, spark_fast; print(spark_fast.pipelines.__file__)"
    assert programs.parent in Path(run(programs / "python", "-c", script, cwd=place).strip()).parents


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_installed_and_says_its_version_and_usage(programs, place, command):
    assert run(programs / command, "--version", cwd=place) == f"{command} {spark_fast.__version__}\n"
    assert run(programs / command, "--help", cwd=place).startswith(f"usage: {command} ")


def test_the_images_are_converted_and_then_trained_on_by_torchrun(programs, place):
    said = run(programs / "spark-fast-convert", "images", "shards", "--workers", "1", cwd=place)
    assert "train: 16 images in" in said
    torchrun = (programs / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    tiny = ("--model=resnet10t", "--input_size=64", "--mask=0.5", "--decoder_width=32", "--bs=4", "--workers=1")
    for data in ("images", "shards"):
        said = run(*torchrun, "-m", "spark_fast.train", "r", "--data_path", data, "--dry_run", *tiny, cwd=place)
        assert "GMACs" in said
    assert not (place / "output_r").exists()


def test_a_message_names_the_installed_command(programs, place):
    script = "from spark_fast.commands import command; print(command('convert'))"
    assert run(programs / "python", "-c", script, cwd=place) == "spark-fast-convert\n"
