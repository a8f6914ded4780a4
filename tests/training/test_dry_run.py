"""A dry run: two steps, a plan whose figures are those of the model, and nothing on the disk."""

import io
import re

import pytest
import torch

from spark_fast.pipelines.backends.synthetic import SyntheticPipeline
from spark_fast.pipelines.sampler import Sampler
from spark_fast.run.distributed import Ranks
from spark_fast.training.dry_run import estimate_text, print_estimate, rehearse
from spark_fast.training.pretrain import open_model
from spark_fast.training.pretrain_run import PretrainRun
from spark_fast.training.settings import parse

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ["name", "--pipeline=synthetic", "--model=resnet10t", "--input_size=64", "--mask=0.5", "--decoder_width=32",
         "--bs=8", "--ep=200", "--wp_ep=1"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 200 epochs of one step."""
    monkeypatch.chdir(tmp_path)
    settings, ranks = parse(FLAGS), Ranks(0, 1, torch.device("cpu"), None)
    schedule = Sampler(num_samples=8, batch_size=8, seed=0, rank=0, world_size=1)
    return PretrainRun(settings, ranks, SyntheticPipeline(schedule, (64, 64)), open_model(settings, ranks))


def told(run, capsys):
    """The plan, row by row."""
    print_estimate(run)
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


def test_the_plan_says_what_the_run_would_cost_and_nothing_is_written(run, capsys, tmp_path):
    run.position.step = 50  # as after a resume
    rows = told(run, capsys)
    assert list(tmp_path.iterdir()) == []
    assert list(rows) == ["dry", "encoder", "decoder", "memory", "step", "run", "checkpoint"]
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    encoder = sum(n for name, n in sizes.items() if name.startswith("encoder."))
    for name, parameters in (("encoder", encoder), ("decoder", sum(sizes.values()) - encoder)):
        macs = getattr(run.mfu.cost, name)
        assert f"{parameters / 1e6:.1f} M parameters, {macs / 1e9:.3g} GMACs per image" in rows[name]
    assert "GiB of the process at most" in rows["memory"]
    assert re.search(r"[\d.]+ s \(data .*, forward .*, backward .*, optimizer .*\), [\d.]+ images/s, MFU", rows["step"])
    assert "150 steps to go, 1 per epoch" in rows["run"]
    assert rows["checkpoint"].endswith("output_name/ckpt-last.pth")


def test_the_time_to_go_is_that_of_so_many_steps(run):
    figures = dict.fromkeys(("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"), 1.0)
    text = estimate_text(
        run, figures | {"loss": 1.0, "step_seconds": 9.0, "images_per_second": 8 / 9, "mfu": 0.5}, to_go=200
    )
    assert "200 steps to go, 1 per epoch: 0:30:00 at this pace" in text
    assert "9 s (data 1, forward 1, backward 1, optimizer 1), 0.9 images/s, MFU 50.0%, loss 1.0000" in text


def test_the_size_of_a_checkpoint_is_that_of_the_file(run, capsys):
    row = told(run, capsys)["checkpoint"]
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    assert int(row.split()[1]) == pytest.approx(file.tell() / 2**20, rel=0.02)


def test_two_steps_are_taken_in_two_epochs_if_they_are_that_short(run):
    before = [p.clone() for p in run.model.parameters()]
    figures = rehearse(run, 2)
    assert run.position.step == 2
    assert figures["steps"] == 1, "the figures are those of the last step"
    assert any(not torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
