"""The command itself: trained, killed, resumed, stopped, and given wrong things."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from spark_fast.cli.train import main
from spark_fast.errors import CTRL_C
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.run.config import tomllib
from spark_fast.run.run_folder import CHECKPOINT
from tests.checkpoint.test_file import Evil
from tests.cli.tiny_run import TINY, assert_same_weights, command, here, losses, pictures, train, weights  # noqa: F401
from tests.commands import HANG_SECONDS
from tests.faults import trainee
from tests.processes import Forked, run_forked


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):  # noqa: F811
    """A run of 3 epochs of 6 steps, never disturbed."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    flags = ["name", f"--data_path={pictures}", *TINY, "--bs=8", "--ep=3", "--base_lr=0.01", "--save_every=1"]
    done = here(*flags, f"--exp_dir={folder}", "--log_every=1")
    return folder, flags, done


def test_a_run_leaves_everything_that_is_promised(unbroken):
    folder, _, done = unbroken
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 19))
    assert {"loss", "lr", "weight_decay", "grad_norm", "images_per_second", "data_wait"} <= set(rows[0])
    assert {"mfu", "memory_gib"} <= set(rows[0])
    phases = [sum(r[f"{name}_seconds"] for name in ("data", "forward", "backward", "optimizer")) for r in rows]
    assert all(0 < p <= r["step_seconds"] for p, r in zip(phases, rows, strict=True))
    head, *epochs = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert {"cmd", "git_commit_id", "versions", "settings"} <= set(head)
    assert [e["epoch"] for e in epochs] == ["1/3", "2/3", "3/3"]
    assert {"loss", "images_per_second", "data_wait", "remaining", "finish"} <= set(epochs[0])
    assert (folder / "stdout_backup.txt").read_text() == done.stdout
    assert (folder / "stderr_backup.txt").read_text() == done.stderr
    assert "  steps       18 (3 epochs of 6)\n  warm-up     6 steps\n  peak rate   0.00031" in done.stdout
    assert "18 steps are few" in done.stderr
    assert "this run has learned almost nothing" in done.stderr
    assert list((folder / "tensorboard").iterdir())
    picture = np.asarray(Image.open(folder / "reconstruction" / "epoch_0003.png"))
    titles, note = 3 * 17 + 8, 2 * 17 + 4  # in lines of 17 px
    assert picture.shape == (titles + 2 * (8 * 68 + 4) + note, 2 * (3 * 68 + 4), 3), "64 px are enlarged to 128"
    assert "everything is in" in done.stdout


def test_the_weights_load_into_timm(unbroken):
    state = safetensors.torch.load_file(unbroken[0] / "resnet10t_timm.safetensors")
    timm.create_model("resnet10t", num_classes=0).load_state_dict(state, strict=True)
    model = weights(unbroken[0])["model"]
    assert torch.equal(state["conv1.0.weight"], model["encoder.network.conv1.0.weight"])


@pytest.mark.slow
def test_config_toml_repeats_the_run(unbroken, tmp_path):
    folder, _, _ = unbroken
    here(f"--config={folder / 'config.toml'}", f"--exp_dir={tmp_path / 'again'}")
    assert_same_weights(folder, tmp_path / "again")


def killed_after(steps, folder, words):
    """Start a run and kill it with SIGKILL once it reports `steps` more steps than it began with."""
    metrics = folder / "metrics.jsonl"
    seen = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    process = Forked(main, *words, folder=folder.parent)
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= seen + steps:
            time.sleep(random.random() * 0.1)  # anywhere: in a step, in the save, while loading
            process.kill()
        time.sleep(0.005)
    process.wait()


@pytest.mark.slow
def test_killed_over_shards_and_resumed_it_ends_with_the_bits_of_the_raw_folder(unbroken, pictures, tmp_path):  # noqa: F811
    """Over a raw folder, and more often: faults/test_run.py."""
    folder, flags, _ = unbroken
    convert(pictures, tmp_path / "shards", ConvertSettings(Reencode(short_side=0), images_per_shard=20))
    flags = [f"--data_path={tmp_path / 'shards'}" if f.startswith("--data_path") else f for f in flags]
    words = [*flags, f"--exp_dir={tmp_path / 'run'}", "--log_every=1", "--resume=auto"]
    for _ in range(2):
        killed_after(random.randint(1, 8), tmp_path / "run", words)
    here(*words)
    assert_same_weights(folder, tmp_path / "run")
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 19)), "each step once, in order"


@pytest.mark.slow
def test_killed_and_resumed_on_real_images(imagenet_sample, tmp_path):
    flags = ["name", f"--data_path={imagenet_sample}", *TINY, "--bs=40", "--ep=2", "--save_every=1", "--log_every=1"]
    here(*flags, f"--exp_dir={tmp_path / 'whole'}")
    words = [*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto"]
    killed_after(random.randint(1, 6), tmp_path / "run", words)
    here(*words)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # SIGUSR1: tests/faults/test_checkpoint_faults.py
def test_a_signal_saves_and_says_how_to_resume(unbroken, tmp_path, number):
    """It comes with the batch of the ninth step, which is then the last."""
    folder, flags, _ = unbroken
    flags = [f for f in flags if f != "--save_every=1"]
    words = [*flags, f"--exp_dir={tmp_path / 'run'}", "--log_every=1"]
    done = run_forked(trainee.main, tmp_path / "ledger", f"0:8:{number.name[3:]}", *words, code=75)
    assert "--resume auto" in done.stdout
    assert weights(tmp_path / "run")["step"] == 9
    here(*words, "--resume=auto")
    assert_same_weights(folder, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path):
    folder, flags, _ = unbroken
    shutil.copytree(folder, tmp_path / "run")
    done = here(*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto")
    assert "done: 18 steps" in done.stdout
    assert_same_weights(folder, tmp_path / "run")


@pytest.mark.slow
def test_stopped_exactly_at_the_end_of_an_epoch_it_goes_on_with_the_next(unbroken, tmp_path):
    folder, flags, _ = unbroken
    here(*flags, f"--exp_dir={tmp_path / 'run'}", "--max_steps=6", code=75)
    here(*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto")
    assert_same_weights(folder, tmp_path / "run")


def read_lines(count, *words):
    """(exit code, standard error) of a run whose reader closes its output after so many lines."""
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(count):
        process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    return process.wait(timeout=HANG_SECONDS), said


@pytest.mark.slow
def test_a_reader_that_goes_costs_the_output_and_not_the_run(unbroken, tmp_path):
    folder, flags, _ = unbroken
    code, said = read_lines(1, *flags, f"--exp_dir={tmp_path / 'run'}", "--log_every=1")
    assert code == 0, said
    assert said.count("nobody reads stdout any more: the run continues without it") == 1
    assert "Traceback" not in said
    assert "done: 18 steps" in (tmp_path / "run" / "stdout_backup.txt").read_text()
    assert (tmp_path / "run" / "stderr_backup.txt").read_text() == said
    assert_same_weights(folder, tmp_path / "run")


@pytest.mark.slow
def test_in_an_ascii_locale_paths_with_other_letters_can_be_trained_on_and_repeated(pictures, tmp_path):  # noqa: F811
    shutil.copytree(pictures, tmp_path / "Bilder ü")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = [f"--data_path={tmp_path / 'Bilder ü'}", *TINY, "--bs=24", "--ep=1", f"--exp_dir={tmp_path / 'ä'}"]
    done = train("ö", *words, env=ascii_only)
    assert f"everything is in {tmp_path}/" in done.stdout
    config = tmp_path / "ä" / "config.toml"
    assert tomllib.loads(config.read_text(encoding="utf-8"))["data"]["data_path"] == str(tmp_path / "Bilder ü")
    again = [f"--config={config}", f"--exp_dir={tmp_path / 'again'}"]
    train(*again, env=ascii_only)
    assert_same_weights(tmp_path / "ä", tmp_path / "again")


@pytest.mark.slow
def test_a_stopped_run_leaves_a_word_until_it_is_gone_on_with(unbroken, tmp_path, monkeypatch):
    """Under torchrun the exit code cannot say it."""
    _, flags, _ = unbroken
    words, note = [*flags, f"--exp_dir={tmp_path / 'run'}"], tmp_path / "run" / "stopped.txt"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    done = here(*words, "--max_steps=1")
    assert note.read_text().startswith("stopped at step 1 of 18; saved ")
    assert f"exit code 0 for torchrun; {note} marks the run as unfinished" in done.stderr
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    here(*words, "--resume=auto", "--max_steps=1", code=75)
    assert note.read_text().startswith("stopped at step 2 of 18; saved ")
    here(*words, "--resume=auto")
    assert not note.exists()


@pytest.mark.slow
def test_bf16_accumulation_compile_free_flags_and_synthetic_data_run(tmp_path):
    base = ["name", "--pipeline=synthetic", *TINY, "--bs=8", "--ep=1", "--max_steps=3", "--log_every=1"]
    for i, extra in enumerate((["--precision=bf16"], ["--accumulate=2"], ["--encoder=masked"], ["--opt=adamw"])):
        done = here(*base, *extra, f"--exp_dir={tmp_path / str(i)}", code=75)
        assert "loss 1.0" in done.stdout or "loss 0.9" in done.stdout


def test_starting_from_weights_begins_at_step_one(unbroken, pictures, tmp_path):  # noqa: F811
    folder, flags, _ = unbroken
    done = here(*flags, f"--exp_dir={tmp_path / 'run'}", f"--init_weight={folder / 'ckpt-last.pth'}", "--max_steps=1",
                 "--log_every=1", code=75)  # fmt: skip
    assert "step 1/18" in done.stdout
    assert losses(tmp_path / "run")[0] < losses(folder)[0]


BAD = [
    ([], 2, "needs a name"),
    (["--data_path={tmp}/nowhere"], 3, "nowhere"),
    (["--data_path={tmp}/empty"], 3, "empty"),
    (["--input_size=70"], 2, "input size 70x70 is not a multiple of the patch, 32 px"),
    (["--input_size=big"], 2, "N or HxW"),
    (["--mask=1.5"], 2, "between 0 and 1, got 1.5"),
    (["--mask=0.95"], 2, "no patch visible of the 2x2 patches"),
    (["--bs=100"], 3, "100"),
    (["--model=resnet51"], 2, "did you mean resnet51q, resnet50"),
    (["--model=inception_v3"], 2, "patches do not stay aligned"),
    (["--model=vit_tiny_patch16_224"], 2, "attn (Attention)"),
    (["--decoder_width=31"], 2, "the smallest is 32"),
    (["--epoch=3"], 2, "--epochs"),
    (["--pipeline=torhc"], 2, "'torhc' is unknown"),
    (["--stages=9"], 2, "stages must be from 1 to 4"),
    (["--model=package_not_there:build"], 2, "No module named 'package_not_there'"),
    (["--resume={tmp}/none.pth"], 6, "none.pth"),
    (["--resume={tmp}/a", "--init_weight={tmp}/b"], 2, "choose one"),
    (["--init_weight={other}"], 2, "does not fit this model"),
    (["--resume={other}"], 2, "model was 'resnet10t', is 'resnet14t'"),
    (["--resume={evil}"], 6, "holds pickled code"),
    (["--accumulate=3"], 2, "does not divide"),
    (["--device=cuda"], 2, "no GPU"),
    (["--config={tmp}/none.toml"], 2, "none.toml"),
    (["--wandb=project"], 2, "pip install 'spark-fast[wandb]'"),
]


@pytest.mark.slow
def test_your_own_network_trains_from_the_command_line_with_smaller_patches(pictures, tmp_path):  # noqa: F811
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "your_own_network.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "my_unet.py").write_text(code)
    flags = [f"--data_path={pictures}", *TINY[2:], "--bs=8", "--ep=1", "--input_size=64x96"]
    done = train("own", *flags, "--model=my_unet:build", f"--exp_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert "checking that the packed encoder computes what the network computes" in done.stderr
    saved = safetensors.torch.load_file(tmp_path / "run" / "encoder.safetensors")
    assert "stages.0.conv1.weight" in saved
    done = here("eights", *flags, "--model=resnet10t", "--stages=2", f"--exp_dir={tmp_path / 'eights'}")
    assert (tmp_path / "eights" / "resnet10t_timm.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=[" ".join(b[0]) or "nothing" for b in BAD])
def test_wrong_input_is_named_and_leaves_nothing(unbroken, pictures, tmp_path, monkeypatch, words, code, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    if words == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if words == ["--wandb=project"] and find_spec("wandb"):
        pytest.skip("wandb is installed here")
    (tmp_path / "empty").mkdir()
    torch.save(Evil(tmp_path / "touched"), tmp_path / "evil.pth")
    places = {"tmp": tmp_path, "other": unbroken[0] / "ckpt-last.pth", "evil": tmp_path / "evil.pth"}
    name = ["name"] if words else []
    model = ["--model=resnet14t"] if "{other}" in " ".join(words) else []
    flags = [*name, f"--data_path={pictures}", *TINY, "--bs=8", "--ep=3", "--base_lr=0.01", *model]
    before = set(tmp_path.iterdir())
    done = here(*flags, *[w.format(**places) for w in words], code=code)
    assert message in done.stderr.replace("\n", " "), done.stderr
    assert "Traceback" not in done.stderr
    assert set(tmp_path.iterdir()) == before, "something was left behind"


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_before_training_begins_is_no_traceback(saved, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("spark_fast.cli.train.pretrain_from_settings", interrupted)
    if saved:
        (tmp_path / CHECKPOINT).touch()
    assert main(["name", f"--data_path={tmp_path}", f"--exp_dir={tmp_path}", "--device=cpu"]) == CTRL_C
    kept = "the last checkpoint is kept: continue with --resume auto" if saved else "nothing was saved before"
    assert capsys.readouterr().err == f"spark-fast-train: interrupted; {kept}\n"


def test_a_loss_that_is_no_number_stops_the_run_with_the_last_good_checkpoint(pictures, tmp_path):  # noqa: F811
    flags = ["name", f"--data_path={pictures}", *TINY, "--bs=8", "--ep=3", f"--exp_dir={tmp_path / 'run'}"]
    wild = ["--opt=sgd", "--clip=0", "--base_lr=1e12", "--log_every=1", "--save_every=1"]
    done = here(*flags, *wild, code=4)
    assert "lower --base_lr" in done.stderr
    if (tmp_path / "run" / "ckpt-last.pth").exists():
        assert np.isfinite(weights(tmp_path / "run")["loss"])


def test_a_dry_run_prints_the_plan_and_leaves_nothing(unbroken, tmp_path, monkeypatch):
    folder, flags, _ = unbroken
    monkeypatch.chdir(tmp_path)
    done = here(*flags, "--dry_run")
    assert "GMACs per image" in done.stdout
    assert "18 steps to go, 6 per epoch" in done.stdout
    assert list(tmp_path.iterdir()) == []
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = here(*flags, "--dry_run", f"--exp_dir={folder}", code=2)
    assert "holds a run already" in done.stderr
    done = here(*flags, "--dry_run", f"--exp_dir={folder}", "--resume=auto")
    assert "0 steps to go" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_a_profile_is_taken_while_training_goes_on(unbroken, tmp_path):
    folder, flags, _ = unbroken
    done = here(*flags, f"--exp_dir={tmp_path / 'run'}", "--profile")
    assert (tmp_path / "run" / "profile" / "steps_5-8.json.gz").is_file()
    assert "https://ui.perfetto.dev" in done.stdout
    assert_same_weights(folder, tmp_path / "run")


@pytest.mark.slow
def test_loggers_that_fail_are_a_warning_each_and_training_is_the_same(unbroken, tmp_path):
    folder, flags, _ = unbroken
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file in its place")
    (tmp_path / "wandb.py").write_text(
        "class Run:\n    def log(self, row, step):\n        raise ConnectionError('the network is down')\n"
        "    def finish(self):\n        raise ConnectionError('the network is down')\n"
        "Settings = dict\ndef init(**kwargs):\n    return Run()\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    words = [*flags, f"--exp_dir={tmp_path / 'run'}", "--wandb=project", "--log_every=1"]
    done = train(*words, env={**os.environ, "PYTHONPATH": paths})
    assert done.stderr.count("Weights & Biases failed (ConnectionError: the network is down)") == 1
    assert done.stderr.count("TensorBoard failed (") == 1
    assert_same_weights(folder, tmp_path / "run")
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 19))


def test_a_run_folder_in_use_by_an_earlier_run_is_not_overwritten(unbroken):
    folder, flags, _ = unbroken
    before = (folder / "ckpt-last.pth").read_bytes()
    done = here(*flags, f"--exp_dir={folder}", code=2)
    assert "holds a run already" in done.stderr
    assert (folder / "ckpt-last.pth").read_bytes() == before


def test_damaged_images_are_named_counted_and_replaced(pictures, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "train/class0/000.JPEG").write_bytes(b"")
    (data / "train/class1/001.JPEG").write_bytes((data / "train/class1/003.JPEG").read_bytes()[:500])
    Image.new("L", (90, 70), 128).save(data / "train/class0/010.JPEG")
    flags = ["name", f"--data_path={data}", *TINY, "--bs=48", "--ep=1"]
    done = here(*flags, f"--exp_dir={tmp_path / 'run'}")
    assert "000.JPEG" in done.stderr
    assert "001.JPEG" in done.stderr
    last = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert (last["replaced"], last["converted"]) == (2, 1)
