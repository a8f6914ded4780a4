"""k-NN while training: the figures are those of `spark-fast-eval knn`, and the run keeps every bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from spark_fast import build_spark
from spark_fast.cli import eval as evaluate
from spark_fast.cli import train
from spark_fast.errors import DataError
from spark_fast.evaluation.online_knn import OnlineKnn, every_fifth
from spark_fast.run.distributed import Ranks
from spark_fast.training.settings import parse
from tests.commands import HANG_SECONDS, run_here

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = Ranks(0, 1, torch.device("cpu"))
SIZE = ["--input_size=32", "--workers=1", "--threads=1"]
SMALL = f"--model={__name__}:Small"  # a checkpoint of it takes no time
TIMM = ["--model=resnet10t", "--input_size=64"]
STEPS = 3  # an epoch


class Small(nn.Module):
    """Levels of strides 4 and 8, with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        fine = self.fine(x)
        return [fine, self.coarse(fine)]


def write_images(root: Path, count: int, seed: int, classes: int = 3) -> Path:
    """Patches of noise, a little brighter in each class: k-NN through random weights is right now and then."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = root / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(110 + 8 * (i % classes), 40, (8, 8, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(place / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 to learn from, 40 to ask about."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 60, 0)
    write_images(root / "val", 40, 1)
    return root


def flags(images, folder, *more):
    tiny = [SMALL, "--verify=never", "--mask=0.5", "--decoder_width=32", "--bs=16", "--ep=2", "--wp_ep=0", *SIZE]
    how = ["--base_lr=0.1", "--picture_every=0", "--keep_every=1", "--log_every=100"]
    return ["name", f"--data_path={images}", *tiny, *how, f"--exp_dir={folder}", *more]


def trained(images, folder, *more, code=0):
    return run_here(train.main, *flags(images, folder, f"--val_path={images}", "--eval_every=1", *more), code=code)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    return [(r["step"], r["knn_top1"], r["knn_top5"]) for r in rows(folder) if "eval_seconds" in r]


def everything(folder):
    """All that a checkpoint holds but the settings, to the bit."""
    state = torch.load(folder / "ckpt-last.pth", weights_only=True)
    del state["settings"]
    return state


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of two epochs that is evaluated three times."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, trained(images, folder)


@pytest.mark.slow
def test_what_is_compiled_is_not_compiled_again(images, tmp_path, monkeypatch):
    """By torch's compiler without its last step, which writes C++."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_(model, backend=counted))
    counts = []
    for number, run in enumerate((trained, lambda *words: run_here(train.main, *flags(*words)))):
        torch.compiler.reset()
        run(images, tmp_path / str(number), "--compile")
        counts.append(len(graphs))
        graphs.clear()
    assert counts[0] == counts[1] > 0
    assert_same(everything(tmp_path / "0"), everything(tmp_path / "1"))


def asked_afterwards(images, weights, folder, *more):
    words = ["knn", SMALL, f"--data_path={images}", f"--weights={weights}", f"--exp_dir={folder}", *SIZE, *more]
    run_here(evaluate.main, *words)
    found = json.loads((folder / "result.json").read_text())
    return found["top1"], found["top5"]


def test_the_figures_are_those_of_the_command_for_the_checkpoint_of_the_epoch(whole, images, tmp_path):
    folder, told = whole
    found = figures(folder)
    assert [step for step, _, _ in found] == [0, STEPS, 2 * STEPS]
    assert 0 < found[1][1] < 100
    for step, *both in found[1:]:
        path = folder / "checkpoints" / f"step_{step:08d}.pth"
        assert tuple(both) == asked_afterwards(images, path, tmp_path / str(step))
    line = f": knn_top1 {found[2][1]:.2f} %, knn_top5 {found[2][2]:.2f} %\n"
    assert line in told.stdout
    assert "  evaluation  k-NN of 40 images among 60 of" in told.stdout


def test_the_run_ends_with_the_bits_of_one_that_is_not_evaluated(whole, images, tmp_path):
    run_here(train.main, *flags(images, tmp_path / "run"))
    assert_same(everything(whole[0]), everything(tmp_path / "run"))
    losses = [[row["loss"] for row in rows(folder) if "loss" in row] for folder in (whole[0], tmp_path / "run")]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--compile"], marks=pytest.mark.drill),
        pytest.param([*TIMM, "--dp=0.1"], marks=pytest.mark.drill),
        [*TIMM, "--method=fcmae", "--masks_per_image=2"],
        ["--encoder=masked"],
    ],
    ids=["compiled", "timm", "fcmae", "masked"],
)
def test_so_does_one_that_is_compiled_and_one_of_another_network_method_or_encoder(images, tmp_path, more):
    trained(images, tmp_path / "a", *more)
    run_here(train.main, *flags(images, tmp_path / "b", *more))
    assert_same(everything(tmp_path / "a"), everything(tmp_path / "b"))
    last = figures(tmp_path / "a")[2][1:]
    assert last == asked_afterwards(images, tmp_path / "a", tmp_path / "knn", *(TIMM if TIMM[0] in more else []))


slow = pytest.mark.slow


@pytest.mark.parametrize("number", [pytest.param(1, marks=slow), 2, pytest.param(3, marks=slow)])
def test_a_signal_during_an_evaluation_stops_the_run_and_the_resume_makes_up_for_it(
    whole, images, tmp_path, monkeypatch, number
):
    """It comes when the `number`-th evaluation begins: before the first step, after an epoch, after the last one."""
    begun, take_over = [], OnlineKnn._take_over

    def signalled(self, network):
        take_over(self, network)
        begun.append(None)
        if len(begun) == number:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(OnlineKnn, "_take_over", signalled)
    step = STEPS * (number - 1)
    done = trained(images, tmp_path / "run", code=75)
    assert f"stopped at step {step} of {2 * STEPS}; saved " in done.stdout
    assert figures(tmp_path / "run") == figures(whole[0])[: number - 1]
    trained(images, tmp_path / "run", "--resume=auto")
    assert len(begun) == 4, "the one that was given up, once more; the others once"
    assert figures(tmp_path / "run") == figures(whole[0])
    assert_same(everything(whole[0]), everything(tmp_path / "run"))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval/knn_top1")] == [0, STEPS, 2 * STEPS]
    trained(images, tmp_path / "run", "--resume=auto")
    assert len(begun) == 4, "a finished run has nothing left to evaluate"


def test_a_dry_run_names_it_and_takes_no_time_for_it(images, tmp_path, monkeypatch):
    monkeypatch.setattr(OnlineKnn, "measure", None)
    done = trained(images, tmp_path / "run", "--dry_run")
    assert f"  evaluation  k-NN of 40 images among 60 of {images}; its time is not in that of the run" in done.stdout
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_named_before_the_first_step(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "val" / "class1" / "001.jpg").write_bytes(b"noise")
    words = [f"--val_path={tmp_path / 'images'}", "--eval_every=1"]
    done = run_here(train.main, *flags(images, tmp_path / "run", *words), code=3)
    assert "labelled images of --val_path cannot be read" in done.stderr
    assert "class1/001.jpg: " in done.stderr
    assert "step 1/" not in done.stdout
    assert not (tmp_path / "run" / "ckpt-last.pth").exists()


def test_the_figures_are_in_what_the_call_from_python_returns(images, tmp_path, monkeypatch):
    monkeypatch.setattr(OnlineKnn, "measure", lambda self, network: {"knn_top1": 12.5})
    done = train.pretrain(
        images, val_path=images, eval_every=2, model=SMALL.removeprefix("--model="), input_size=32, mask_ratio=0.5,
        decoder_width=32, batch_size=16, epochs=1, picture_every=0, workers=1, threads=1, verify="never",
        exp_dir=tmp_path / "run",
    )  # fmt: skip
    assert (done.metrics["step"], done.metrics["knn_top1"]) == (STEPS, 12.5)


def test_of_each_class_every_fifth_is_a_query():
    labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 2, 2], dtype=np.int32)
    assert np.flatnonzero(every_fifth(labels)).tolist() == [6, 9], "the 5th of class 0, the 5th of class 1, none of 2"
    assert np.flatnonzero(every_fifth(np.zeros(12, dtype=np.int32))).tolist() == [4, 9]
    assert every_fifth(labels[:0]).tolist() == []


def opened(path, alive=lambda step: None):
    asked = parse(["name", f"--data_path={path}", SMALL, *SIZE, f"--val_path={path}", "--eval_every=1"])
    return OnlineKnn(asked, ALONE, torch.float32, alive)


def measured(path, network, **more):
    knn = opened(path, **more)
    try:
        return knn.about, knn.measure(network)
    finally:
        knn.close()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_spark(Small(), input_size=32, mask_ratio=0.5, decoder_width=32, check=False).encoder.network


def test_a_set_without_a_split_is_split_by_that_rule(images, network, tmp_path):
    one = images / "train"
    for place in sorted(one.iterdir()):
        for number, path in enumerate(sorted(place.iterdir())):
            part = tmp_path / "split" / ("val" if number % 5 == 4 else "train") / place.name
            part.mkdir(parents=True, exist_ok=True)
            (part / path.name).symlink_to(path)
    about, found = measured(one, network)
    assert about == f"k-NN of 12 images among 48 of {one}"
    assert found == measured(tmp_path / "split", network)[1]
    assert 0 < found["knn_top1"] < 100


def test_it_takes_over_the_weights_and_the_batch_statistics_of_the_first_rank(images, network):
    class OfTwo(Ranks):
        def first(self, value):
            return torch.full_like(value, 7)

    asked = parse(["name", "--data_path=x", SMALL, *SIZE, f"--val_path={images}", "--eval_every=1"])
    knn = OnlineKnn(asked, OfTwo(0, 1, torch.device("cpu")), torch.float32, lambda step: None)
    knn.measure(network)
    knn.close()
    assert_same(dict(knn._network.named_parameters()), dict(network.named_parameters()))
    assert all((buffer == 7).all() for buffer in knn._network.buffers())


def test_it_leaves_the_network_and_the_random_numbers_as_they_were(images, network):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    asked = []
    measured(images, network, alive=asked.append)
    assert torch.equal(torch.rand(3), expected)
    assert_same(dict(network.state_dict()), before)
    assert all(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())
    assert asked == [0, 0, 0], "one batch each to learn from and to ask about, one part of the queries"


def test_a_list_with_labels_is_such_a_set(images, network, tmp_path):
    shutil.copytree(images / "train", tmp_path / "images")
    names = sorted(path.relative_to(tmp_path / "images") for path in (tmp_path / "images").rglob("*.jpg"))
    (tmp_path / "images" / "list.txt").write_text("".join(f"{name} {name.parent.name[-1]}\n" for name in names))
    assert measured(tmp_path / "images" / "list.txt", network)[1] == measured(images / "train", network)[1]


def flat(root):
    (write_images(root / "a", 6, 0, 1) / "class0").rename(root / "flat")
    return root / "flat"


def with_empty(root):
    write_images(root, 60, 0)
    (root / "nothing").mkdir()
    return root


def of_others(root):
    write_images(root / "train", 60, 0)
    write_images(root / "val", 3, 0)
    (root / "val" / "class2").rename(root / "val" / "violet")
    return root


WRONG = {
    "nowhere": (lambda root: root / "no", "--val_path: .*no does not exist"),
    "no labels": (flat, "--val_path: .*flat has no labels: images must lie in class folders"),
    "one class": (lambda root: write_images(root, 30, 0, 1), "has images of one class only: k-NN needs two"),
    "an empty class": (with_empty, r"1 classes have no image to learn from \(nothing\): remove their folders"),
    "another data set": (of_others, "val has 1 classes that the training images do not have: violet"),
    "nothing to ask about": (
        lambda root: write_images(root, 40, 0, 10),
        "no class has 5 images, so there are no queries",
    ),
    "fewer than k": (lambda root: write_images(root, 20, 0, 2), "16 images to learn from are fewer than the 20 neigh"),
}


@pytest.mark.parametrize("case", WRONG)
def test_images_that_k_nn_can_say_nothing_of_are_refused(tmp_path, case):
    make, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        opened(make(tmp_path / "images"))


@pytest.mark.slow
def test_two_ranks_share_the_work_and_judge_by_the_statistics_of_the_first(images, tmp_path):
    """Each rank has its own batch statistics; those of the checkpoint count."""
    words = flags(images, tmp_path / "run", f"--val_path={images}", "--eval_every=1", "--sbn=0")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "spark_fast.train", *words]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=HANG_SECONDS, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for step, *both in figures(tmp_path / "run")[1:]:
        path = tmp_path / "run" / "checkpoints" / f"step_{step:08d}.pth"
        assert tuple(both) == asked_afterwards(images, path, tmp_path / str(step))
