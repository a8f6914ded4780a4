"""The command in each of its modes: what it leaves behind, killed and resumed, on two ranks, and given wrong things."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from spark_fast import build_spark
from spark_fast.cli.eval import main
from spark_fast.errors import INTERRUPTED
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.training.settings import Settings
from spark_fast.weights.spark_keys import spark_state_dict
from spark_fast.weights.timm_keys import write_encoder
from tests.cli.conftest import CLASSES, TINY, write_pictures
from tests.commands import HANG_SECONDS, as_it_was

FRESH = "--weights=none"


def result(folder):
    return json.loads((folder / "result.json").read_text())


def measured(folder):
    return [result(folder)[k] for k in ("top1", "top5", "images", "train_images", "classes", "accuracy_of_class")]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_neighbours_tell_colours_apart_even_through_random_weights(run, tmp_path, capsys):
    assert run("knn", FRESH, f"--exp_dir={tmp_path / 'a'}", "--k=5") == 0
    found = result(tmp_path / "a")
    assert found["mode"] == "knn"
    assert found["top1"] > 90
    assert found["top5"] == 100
    assert found["images"] == 13
    assert found["train_images"] == 48
    assert found["classes"] == list(CLASSES)
    assert len(found["accuracy_of_class"]) == 4
    assert found["settings"]["data"]["crop_pct"] == 0.875
    assert Image.open(tmp_path / "a" / "confusion.png").size[0] > 300
    assert f"top-1 {found['top1']:.2f} %" in capsys.readouterr().out
    assert run("knn", FRESH, f"--exp_dir={tmp_path / 'a'}", "--k=5") == 2
    assert "holds a run already: delete the folder, or choose another" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--opt=sgd"], ["--opt=adamw", "--base_lr=0.05"], ["--opt=lars", "--augment"]])
def test_a_linear_probe_learns(run, tmp_path, words):
    epochs = 3 if "--augment" in words else 12
    assert run("linear", FRESH, f"--exp_dir={tmp_path / 'a'}", f"--ep={epochs}", "--wp_ep=1", *words) == 0
    found = result(tmp_path / "a")
    told = rows(tmp_path / "a")
    assert [row["epoch"] for row in told] == list(range(1, epochs + 1))
    assert told[-1]["top1"] == found["top1"]
    assert told[-1]["loss"] < told[0]["loss"]
    assert found["images"] == 13
    if "--augment" not in words:
        assert found["top1"] > 75


def finetuned(run, folder, *words):
    recipe = ["--ep=3", "--wp_ep=1", "--ema=0.5", "--log_every=1", "--augment=trivial", "--erase=0.5", "--repeats=2"]
    return run("finetune", FRESH, f"--exp_dir={folder}", *recipe, *words)


def assert_same_bits(a, b):
    state, other = (torch.load(folder / "ckpt-last.pth", weights_only=True) for folder in (a, b))
    for part in ("model", "ema", "optimizer", "best"):
        one, two = io.BytesIO(), io.BytesIO()
        torch.save(state[part], one), torch.save(other[part], two)
        assert one.getvalue() == two.getvalue(), f"{part} differs to the bit"


@pytest.mark.slow
def test_a_run_of_fine_tuning_killed_in_the_middle_of_an_epoch_ends_with_the_same_bits(run, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finetuned(run, whole) == 0
    assert finetuned(run, broken, "--max_steps=4") == 75
    assert "stopped at step 4 of 9" in capsys.readouterr().out
    assert not (broken / "result.json").exists()
    assert finetuned(run, broken) == 2, "only with --resume"
    assert finetuned(run, broken, "--resume=auto", "--max_steps=2") == 75
    assert finetuned(run, broken, "--resume=auto") == 0
    assert_same_bits(whole, broken)
    kept = ("top1", "top5", "epoch", "weights", "last", "accuracy_of_class")
    assert [result(whole)[k] for k in kept] == [result(broken)[k] for k in kept]
    steps = [row["step"] for row in rows(broken) if "grad_norm" in row]
    assert steps == list(range(1, 10))
    capsys.readouterr()
    assert finetuned(run, broken, "--resume=auto", "--mixup=0.9") == 2
    assert "mixup was 0.1, is 0.9" in capsys.readouterr().err
    assert finetuned(run, broken, "--resume=auto", f"--weights={whole}") == 2
    assert f"is {str(whole)!r}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_weights_are_timms(run, tmp_path):
    assert finetuned(run, tmp_path / "a", "--opt=adamw", "--base_lr=0.02", "--loss=ce", "--layer_decay=1") == 0
    state = load_file(tmp_path / "a" / "resnet10t_timm.safetensors")
    timm.create_model("resnet10t", num_classes=4).load_state_dict(state, strict=True)
    found = result(tmp_path / "a")
    every = [row for row in rows(tmp_path / "a") if "raw_top1" in row]
    assert found["top1"] == max(max(row["raw_top1"], row["ema_top1"]) for row in every)
    assert run("knn", f"--weights={tmp_path / 'a'}", f"--exp_dir={tmp_path / 'b'}", "--k=3") == 0, "weights of a folder"
    path = tmp_path / "a" / "resnet10t_timm.safetensors"
    words = ["finetune", f"--weights={path}", f"--exp_dir={tmp_path / 'c'}", "--ep=1", "--wp_ep=0", *TINY[1:]]
    assert run("", *words, f"--data_path={found['settings']['data']['data_path']}") == 0, "the file names its network"


def ranks(number, folder, pictures, mode, *words):
    command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "-m", "spark_fast.evaluate"]
    given = [mode, *TINY, f"--data_path={pictures}", FRESH, f"--exp_dir={folder}", *words]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *command, *given]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_ranks_give_the_neighbours_of_one(run, pictures, tmp_path):
    assert run("knn", FRESH, f"--exp_dir={tmp_path / 'one'}", "--k=9") == 0
    ranks(2, tmp_path / "two", pictures, "knn", "--k=9")
    assert measured(tmp_path / "one") == measured(tmp_path / "two")


@pytest.mark.slow
def test_two_ranks_fine_tune_and_count_every_image_once(pictures, tmp_path):
    ranks(2, tmp_path / "two", pictures, "finetune", "--ep=1", "--wp_ep=0")
    found = result(tmp_path / "two")
    assert found["images"] == 13
    assert {"raw_top1", "ema_top1"} <= set(found["last"])


@pytest.mark.parametrize("kind", ["whole", "encoder"])
@pytest.mark.slow
def test_a_published_file_that_names_no_network_is_recognised_as_by_the_exporter(pictures, tmp_path, kind):
    state = spark_state_dict(build_spark("resnet18", input_size=64, decoder_width=32, check=False))
    prefix = "sparse_encoder.sp_cnn."
    encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    torch.save({"module": state} if kind == "whole" else encoder, tmp_path / "a.pth")
    words = [f"--weights={tmp_path / 'a.pth'}", f"--data_path={pictures}", f"--exp_dir={tmp_path / 'a'}", "--k=3"]
    with as_it_was():
        assert main(["knn", *words, *TINY[1:]]) == 0
    assert result(tmp_path / "a")["settings"]["model"]["model"] == "resnet18"


@pytest.mark.slow
def test_a_network_that_nobody_knows_is_said_to_look_like_what_it_does(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spark_fast.weights.identify.LOOKALIKES", ("resnet14t", "resnet10t"))  # all of them: seconds
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "a.pth")
    words = [f"--weights={tmp_path / 'a.pth'}", f"--data_path={pictures}", f"--exp_dir={tmp_path / 'a'}"]
    with as_it_was():
        assert main(["knn", *words, *TINY[1:]]) == 2
    assert "--model is missing: " in (said := capsys.readouterr().err)
    assert "name the network with --model (it looks like resnet10t)" in said


WRONG = [
    (["kn"], 2, "did you mean knn"),
    (["knn", "a", FRESH], 2, "--data_path is missing"),
    (["knn", "a", "--data_path={pictures}"], 2, "--weights is missing"),
    (["knn", "a", "--data_path={pictures}", FRESH], 2, "--model is missing"),
    (["knn", "--data_path={pictures}", *TINY, FRESH], 2, "needs a name"),
    (["knn", "a", "--data_path={pictures}", *TINY, FRESH, "--k=49"], 2, "--k 49 is larger than the number"),
    (["knn", "a", "--data_path={pictures}", *TINY, FRESH, "--k=0"], 2, "--k must be positive, got 0"),
    (["knn", "a", "--data_path={pictures}", *TINY, FRESH, "--crop_pct=1.5"], 2, "--crop_pct must be at most 1"),
    (["knn", "a", "--data_path={pictures}", *TINY, FRESH, "--model=resnet51"], 2, "did you mean resnet51q"),
    (["knn", "a", "--data_path={pictures}", *TINY, "--weights={tmp}/no.pth"], 6, "no.pth"),
    (["knn", "a", "--data_path={pictures}", *TINY, "--weights={tmp}"], 6, "pass a run folder, or a .pth"),
    (["knn", "a", "--data_path={pictures}", *TINY, "--weights={other}"], 2, "missing: "),
    (["knn", "a", "--data_path={pictures}/train", *TINY, FRESH], 3, "(--val_path names the validation images"),
    (["knn", "a", "--data_path={pictures}/train/red", *TINY, FRESH], 3, "red has no labels"),
    (["knn", "a", "--data_path={pictures}", *TINY, FRESH, "--val_path={pictures}/val/red"], 3, "red has no labels"),
    (["knn", "a", "--data_path={pictures}", *TINY, FRESH, "--val_path={tmp}/more"], 3, "1 classes that the training"),
    (["linear", "a", "--data_path={pictures}", *TINY, FRESH, "--bs=50"], 2, "--batch_size 50 is larger than"),
    (["finetune", "a", "--data_path={pictures}", *TINY, FRESH, "--bs=50"], 3, "batch of 50 is larger than the 48"),
    (["finetune", "a", "--data_path={pictures}", *TINY, FRESH, "--bs=15"], 2, "--mixup 0 --cutmix 0"),
    (["finetune", "a", "--data_path={pictures}", *TINY, FRESH, "--accumulate=3"], 2, "does not divide the 16"),
    (["finetune", "a", "--data_path={pictures}", *TINY, FRESH, "--resume={tmp}/no.pth"], 6, "to resume from"),
    (["finetune", "a", "--data_path={pictures}", *TINY, FRESH, "--layer_decay=2"], 2, "_decay must be at most 1"),
    (["finetune", "a", "--data_path={pictures}", *TINY, FRESH, "--ema=1"], 2, "--ema must be below 1"),
    (["finetune", "a", "--config={tmp}/typo.toml"], 2, "did you mean mixup"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code", "message"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_things_are_named_and_leave_nothing(run, pictures, tmp_path, monkeypatch, capsys, words, code, message):
    state = timm.create_model("resnet14t").state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("layer4")}, tmp_path / "other.pth")
    write_pictures(tmp_path / "more", 4, 0)
    (tmp_path / "more" / "red").rename(tmp_path / "more" / "violet")
    (tmp_path / "typo.toml").write_text("[recipe]\nmixpu = 0.1\n")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    places = {"pictures": pictures, "tmp": tmp_path, "other": tmp_path / "other.pth"}
    assert run("", *[word.format(**places) for word in words]) == code
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before, "something was left behind"


def test_unknown_flags_are_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "a", "--layer_dekay=0.5"])
    assert caught.value.code == 2
    assert "--layer_decay" in capsys.readouterr().err


def test_classes_are_matched_by_name_where_some_are_not_among_those_to_judge_by(run, tmp_path):
    write_pictures(tmp_path / "some", 12, 3)
    for path in (tmp_path / "some" / "blue").iterdir():
        path.unlink()
    (tmp_path / "some" / "blue").rmdir()
    assert run("knn", FRESH, f"--exp_dir={tmp_path / 'a'}", "--k=5", f"--val_path={tmp_path / 'some'}") == 0
    found = result(tmp_path / "a")
    assert (found["images"], found["accuracy_of_class"][0]) == (9, None)
    assert np.mean(found["accuracy_of_class"][1:]) > 80


def test_unmatched_classes_are_named_with_their_folder_and_the_remedy(run, tmp_path, capsys):
    write_pictures(tmp_path / "data" / "train", 8, 0)
    write_pictures(tmp_path / "data" / "val", 4, 1)
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "violet")
    assert run("", "knn", "a", f"--data_path={tmp_path / 'data'}", *TINY, FRESH, "--bs=4", "--k=2") == 3
    said = (
        f"{tmp_path}/data/val has 1 classes that the training images do not have: violet. Classes are matched by name: "
    )
    advice = "give val/ the class folders of train/, or name other images with --val_path"
    assert said + advice in capsys.readouterr().err


def test_weights_may_be_a_published_file_with_official_names(run, tmp_path):
    torch.manual_seed(0)
    model = build_spark("convnext_atto", input_size=64, mask_ratio=0.5, decoder_width=32)
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    published = spark_state_dict(model)
    assert "sparse_encoder.sp_cnn.stages.0.0.dwconv.weight" in published
    torch.save({"module": published}, tmp_path / "published.pth")
    for name in ("ours", "published"):
        words = [f"--weights={tmp_path / name}.pth", "--model=convnext_atto", f"--exp_dir={tmp_path / name}", "--k=5"]
        assert run("knn", *words) == 0
    assert measured(tmp_path / "published") == measured(tmp_path / "ours")


def test_levels_that_were_not_pretrained_are_not_evaluated(run, tmp_path, capsys):
    network = timm.create_model("test_resnet", features_only=True)
    write_encoder(network.state_dict(), "test_resnet", tmp_path, stages=2)
    words = [f"--weights={tmp_path}/test_resnet_timm.safetensors", "--model=test_resnet", f"--exp_dir={tmp_path / 'a'}"]
    assert run("knn", *words, "--k=5", "--stages=4") == 2
    assert "--stages 4: only the first 2 levels of " in capsys.readouterr().err
    assert run("knn", *words, "--k=5") == 0
    assert result(tmp_path / "a")["settings"]["model"]["stages"] == 2


def test_images_may_be_shards(run, pictures, tmp_path):
    convert(pictures, tmp_path / "shards", ConvertSettings(Reencode(short_side=0), images_per_shard=20))
    for name, path in (("folder", pictures), ("shards", tmp_path / "shards")):
        assert run("knn", FRESH, f"--data_path={path}", f"--exp_dir={tmp_path / 'of' / name}", "--k=5") == 0
        assert result(tmp_path / "of" / name)["settings"]["data"]["data_path"] == str(path)
    assert measured(tmp_path / "of" / "shards") == measured(tmp_path / "of" / "folder")


def test_your_own_network_without_a_drop_path_rate_is_fine_tuned_by_default(run, tmp_path, monkeypatch, capsys, caplog):
    code = "import timm\n\ndef build(width=32):\n    return timm.create_model('test_resnet', features_only=True)\n"
    (tmp_path / "own_tuned.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--model=own_tuned:build", FRESH, "--ep=1", "--wp_ep=0", "--bs=48"]
    assert run("finetune", *words, "--dp=0.1", "--exp_dir=a") == 2
    assert "'own_tuned:build' takes no drop_path_rate: give --drop_path 0" in capsys.readouterr().err
    caplog.set_level("INFO", "spark_fast")
    assert run("finetune", *words, "--exp_dir=a") == 0
    assert "own_tuned:build takes no drop_path_rate: it is fine-tuned without" in capsys.readouterr().err
    assert result(tmp_path / "a")["settings"]["recipe"]["drop_path"] == 0


@pytest.fixture
def many_channels(tmp_path):
    """Words that evaluate a checkpoint for images of 12 channels, on generated ones."""
    settings = Settings()
    settings.model.model, settings.data.input_size, settings.model.decoder_width = "test_resnet", "32", 32
    settings.data.in_chans = 12
    model = build_spark("test_resnet", input_size=64, decoder_width=32, in_chans=12, check=False)
    torch.save({"model": model.state_dict(), "settings": settings.to_dict()}, tmp_path / "ckpt.pth")
    return ["--pipeline=synthetic", "--input_size=32", "--bs=512", "--threads=1", f"--weights={tmp_path / 'ckpt.pth'}"]


def test_the_images_have_the_channels_of_the_checkpoint(many_channels, tmp_path):
    with as_it_was():
        assert main(["knn", *many_channels, f"--exp_dir={tmp_path / 'knn'}"]) == 0
    assert result(tmp_path / "knn")["settings"]["data"]["in_chans"] == 12
    assert result(tmp_path / "knn")["top1"] > 90, "each of the sixteen images is seen many times"


@pytest.mark.slow
def test_fine_tuning_for_many_channels_goes_on_with_them_alone_and_without_what_is_for_photographs(
    many_channels, tmp_path, capsys
):
    tune = ["finetune", *many_channels, f"--exp_dir={tmp_path / 'tuned'}", "--resume=auto", "--ep=2", "--wp_ep=1"]
    with as_it_was():
        assert main([*tune, "--max_steps=3"]) == INTERRUPTED
        assert main([*tune, "--in_chans=3"]) == 2
        assert "in_chans was 12, is 3" in capsys.readouterr().err
        assert main(tune) == 0
    assert result(tmp_path / "tuned")["settings"]["data"]["in_chans"] == 12
    assert result(tmp_path / "tuned")["settings"]["recipe"]["augment"] == "none"
