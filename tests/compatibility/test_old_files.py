"""Run folders, checkpoints, shards and settings files of an earlier version go on working (see README.md)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from spark_fast.cli import convert, export, reconstruct, train
from spark_fast.cli import eval as evaluate
from tests.commands import run_here

FILES = Path(__file__).parent / "files"
NETWORK = "compat_network:build"
ENCODER = "encoder.network."

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The current folder, with copies of the files; nothing is written into the files themselves."""
    shutil.copytree(FILES, tmp_path / "old", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.syspath_prepend(tmp_path / "old")
    return tmp_path / "old"


def checkpoint(folder):
    return torch.load(folder / "ckpt-last.pth", weights_only=True)


def metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pretrained(*words, code=0):
    return run_here(train.main, "old", *words, code=code)


def test_a_run_is_resumed_by_its_command_and_ends_as_if_it_had_never_stopped(old):
    done = pretrained("--config=settings.toml", "--exp_dir=run", "--resume=auto")
    assert "resumed from run/checkpoints/step_00000006.pth at step 6 of 8" in done.stderr
    assert checkpoint(old / "run")["step"] == 8
    found, expected = metrics(old / "run" / "metrics.jsonl"), metrics(old / "unbroken_metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for name in ("loss", "lr", "weight_decay", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4), name
    encoder = load_file(old / "run" / "encoder.safetensors")
    for name, value in load_file(old / "unbroken_encoder.safetensors").items():
        torch.testing.assert_close(encoder[name], value, rtol=1e-5, atol=1e-6)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(old):
    path = old / "run" / "checkpoints" / "step_00000006.pth"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    done = pretrained("--config=run/config.toml", "--resume=auto", "--max_steps=0")
    assert "resumed from run/checkpoints/step_00000004.pth at step 4 of 8" in done.stderr
    assert checkpoint(old / "run")["step"] == 8


def test_the_settings_of_a_run_are_read_by_config(old):
    done = run_here(train.main, "--config=run/config.toml", "--print_config")
    assert 'model = "compat_network:build"\n' in done.stdout
    kept = [line for line in (old / "run" / "config.toml").read_text().splitlines() if line]
    assert [line for line in kept if line not in done.stdout.splitlines()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    ["run", "run/ckpt-last.pth", "run/checkpoints/step_00000006.pth", "run/encoder.safetensors", "published.pth"],
)
def test_a_run_begins_from_old_weights(old, source):
    done = pretrained("--config=settings.toml", "--exp_dir=new", f"--init_weight={source}", "--max_steps=1", code=75)
    assert ("the decoder keeps its initial values" in done.stderr) == (source == "run/encoder.safetensors")
    before, after = checkpoint(old / "run")["model"], checkpoint(old / "new")["model"]
    tensors = [name for name in before if name.startswith(ENCODER) or source != "run/encoder.safetensors"]
    for name in tensors:  # the first step's learning rate is next to nothing
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["run", "run/ckpt-last.pth", "run/encoder.safetensors", "published.pth"])
def test_old_weights_are_evaluated(old, source):
    words = [f"--weights={source}", f"--model={NETWORK}", "--exp_dir=new"]
    done = run_here(evaluate.main, "knn", "--config=knn.toml", *words)
    assert "12 of 12 tensors loaded; these keep their initial values: none" in done.stderr
    assert json.loads((old / "new" / "result.json").read_text())["top1"] == 100


@pytest.mark.parametrize("source", ["run", "run/encoder.safetensors", "published.pth"])
def test_code_that_old_weights_name_is_not_imported_unless_the_user_names_it(old, source):
    words = [f"--weights={source}", "--data_path=images", "--input_size=32", "--exp_dir=new"]
    done = run_here(evaluate.main, "knn", "old", *words, code=2)
    assert f"has the weights of your own network: pass --model {NETWORK} to import its code" in done.stderr
    assert export.main([source, "--to", "safetensors", "--out", "new.safetensors"]) == 2
    assert not (old / "new").exists()


@pytest.mark.parametrize("source", ["run", "published.pth"])
def test_old_weights_reconstruct_images(old, source):
    image = next((old / "images" / "val").rglob("*.jpg"))
    words = [source, str(image), "--model", NETWORK, "--input_size", "32", "--out", "grid.png"]
    assert reconstruct.main(words) == 0
    assert Image.open("grid.png").size == (3 * (4 * 36 + 4) + 4, 257)  # enlarged, below titles


@pytest.mark.parametrize("source", ["run", "published.pth"])
def test_old_weights_are_exported(old, source):
    assert export.main([source, "--model", NETWORK, "--to", "safetensors", "--out", "new.safetensors"]) == 0
    model = {k: v for k, v in checkpoint(old / "run")["model"].items() if k.startswith(ENCODER)}
    found = load_file("new.safetensors")
    assert {ENCODER + k for k in found} == set(model)
    assert all(torch.equal(v, model[ENCODER + k]) for k, v in found.items())
    if source == "run":
        card = Path("new.safetensors.README.md").read_text()
        assert [
            part for part in ("| step, epoch | 6, 1 of 2 |", "decoder_width = 8", "| 1 | 0.9") if part not in card
        ] == []


def test_old_weights_leave_in_the_published_names_as_they_did(old):
    assert export.main(["run", "--model", NETWORK, "--to", "spark", "--out", "new.pth"]) == 0
    before, now = (torch.load(path, weights_only=True) for path in ("published.pth", "new.pth"))
    assert now.pop("is_pretrain") is True, "an older version did not write this, nor the four below"
    added = {name: now["module"].pop(name) for name in ("config", "imn_m", "imn_s", "norm_black")}
    assert added["config"]["mask_ratio"] == 0.5
    assert {k: v for k, v in now.items() if k != "module"} == {k: v for k, v in before.items() if k != "module"}
    assert now["module"].keys() == before["module"].keys()
    assert all(torch.equal(v, before["module"][k]) for k, v in now["module"].items())


def test_old_shards_are_verified_and_trained_from(old):
    assert convert.main(["images", "shards", "--images_per_shard", "6", "--verify"]) == 0
    for path in (FILES / "shards").rglob("*.*"):  # the conversion was taken as done
        assert (old / path.relative_to(FILES)).read_bytes() == path.read_bytes()
    done = pretrained("--config=settings.toml", "--data_path=shards", "--exp_dir=new", "--epochs=1")
    assert "done: 4 steps" in done.stdout


def test_a_run_on_the_images_goes_on_from_the_shards_that_were_made_of_them(old):
    done = pretrained("--config=settings.toml", "--exp_dir=run", "--resume=auto", "--data_path=shards")
    assert "done: 8 steps" in done.stdout
