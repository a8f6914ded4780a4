"""What a checkpoint holds of a run is all that it needs to go on."""

from pathlib import Path

import pytest
import torch

from spark_fast.checkpoint.file import read_run, write
from spark_fast.errors import CheckpointError
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.training.pretrain_run import kept_statistics
from spark_fast.training.run_state import Position


def advance(state, steps):
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.ones(2, 4)).sum().backward()
        state.optimizer.step()
        state.position.step += 1


def test_a_position_knows_its_epoch_and_the_end():
    at = Position(steps_per_epoch=5, epochs=3, step=9)
    assert (at.total_steps, at.epoch, at.at_epoch_end) == (15, 1, False)
    at.step = 10
    assert (at.epoch, at.at_epoch_end) == (2, True)


def test_gathered_written_read_and_restored_a_run_goes_on_to_the_same_bits(make_state, alone, tmp_path):
    unbroken, first, second = make_state(), make_state(), make_state()
    advance(unbroken, 5)
    advance(first, 2)
    first.position.loss = 0.5
    write(tmp_path / "c.pth", first.gather(keep=True))
    second.restore(tmp_path / "c.pth", read_run(tmp_path / "c.pth"), alone)
    assert (second.position.step, second.position.begun, second.position.loss) == (2, 2, 0.5)
    advance(second, 3)
    assert torch.equal(second.model.weight, unbroken.model.weight)


def test_a_run_in_bf16_goes_on_in_fp16_with_a_new_loss_scale(make_state, alone, tmp_path):
    first, second = make_state(), make_state()
    first.scaler = torch.amp.GradScaler("cpu", enabled=False)
    second.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    write(tmp_path / "c.pth", first.gather(keep=True))
    second.restore(tmp_path / "c.pth", read_run(tmp_path / "c.pth"), alone)
    assert second.scaler.state_dict()["scale"] == 8.0


def test_the_statistics_of_the_images_go_into_the_checkpoint_and_out_of_the_newest_whole_one(make_state, tmp_path):
    known = Statistics("percentile", "uint16", (0.5,), (0.25,), (3.0,), (60000.0,))
    state = make_state()
    assert "statistics" not in state.gather(keep=True)  # photographs have none
    state.data.statistics = known
    write(tmp_path / "c.pth", state.gather(keep=True))
    (tmp_path / "newer.pth").write_bytes(b"broken")
    assert kept_statistics([tmp_path / "newer.pth", tmp_path / "c.pth"]) == known
    assert kept_statistics([]) is None


def test_what_is_gathered_does_not_change_with_the_next_step(make_state):
    state = make_state()
    content = state.gather(keep=True)
    before = content["model"]["weight"].clone()
    advance(state, 1)
    assert torch.equal(content["model"]["weight"], before)
    assert not torch.equal(state.model.weight, before)


def test_a_rank_that_does_not_write_keeps_nothing(make_state):
    assert make_state().gather(keep=False) == {}


def test_a_kind_of_training_adds_what_it_needs(make_state):
    assert make_state(extra=lambda: {"best": {"top1": 9.0}}).gather(keep=True)["best"] == {"top1": 9.0}


def test_ranks_that_read_different_checkpoints_are_refused(make_state, alone):
    state = make_state()

    class Others:
        def gather(self, step):
            return [step, step + 3]

    with pytest.raises(CheckpointError, match="do not read the same checkpoint"):
        state.restore(Path("x.pth"), make_state().gather(keep=True), Others())


def test_the_size_is_about_that_of_the_file(make_state, tmp_path):
    state = make_state()
    state.model = torch.nn.Linear(400, 400)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.01, momentum=0.9)
    state.model(torch.ones(1, 400)).sum().backward()
    state.optimizer.step()
    write(tmp_path / "c.pth", state.gather(keep=True))
    assert state.size(moments=1) == pytest.approx((tmp_path / "c.pth").stat().st_size, rel=0.02)
