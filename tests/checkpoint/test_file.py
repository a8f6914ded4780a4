"""Checkpoint files: whole or not at all when written, refused by name when they cannot be trusted."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spark_fast.checkpoint import file as checkpoint
from spark_fast.checkpoint.file import read, read_run, restore, snapshot, write
from spark_fast.checkpoint.validate_file import sidecar
from spark_fast.errors import CheckpointError
from spark_fast.training.optimizers.optim import build_optimizer, set_rates
from tests.commands import HANG_SECONDS


class Tiny(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first, self.norm = nn.Linear(3, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.first(x))


def trained(width=4, seed=0):
    torch.manual_seed(seed)
    model = Tiny(width)
    optimizer = build_optimizer("lamb", model, 0.95)
    set_rates(optimizer, 0.1, 0.1)
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "ckpt-last.pth"
    state = {"step": 5, "epoch": 1, "loss": 0.5, "num_samples": 8, "scaler": {}, "settings": {"run": {"seed": 0}}}
    state["random_state"] = checkpoint.random_state()
    checkpoint.write(path, checkpoint.run_state(model, optimizer, **state))
    return path, model, optimizer


def test_what_is_written_is_read_back_and_restored(saved):
    path, model, optimizer = saved
    drawn = torch.rand(3)
    content = read_run(path)
    assert content["step"] == 5
    assert content["settings"] == {"run": {"seed": 0}}
    other, other_optimizer = trained(seed=1)
    restore(path, content, other, other_optimizer)
    assert torch.equal(torch.rand(3), drawn), "random numbers go on where they were"
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for key, state in mine["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(theirs["state"][key][k])) for k, v in state.items())


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from spark_fast.checkpoint import file as checkpoint
from spark_fast.errors import CheckpointError
path, model = Path(sys.argv[1]), nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
checkpoint.write(path, checkpoint.run_state(model, optimizer, step=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.write(path, checkpoint.run_state(model, optimizer, step=2))
except CheckpointError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_a_file_system_that_takes_no_more_is_a_checkpoint_error_and_the_old_one_is_kept(tmp_path):
    path = tmp_path / "ckpt-last.pth"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert f"refused: cannot write {path}" in done.stdout
    assert "File too large" in done.stdout
    assert "It needs 0.4 MB, " in done.stdout
    assert " MB are free there" in done.stdout
    assert read(path)["step"] == 1
    assert sorted(tmp_path.iterdir()) == [path, sidecar(path)]


class Evil:
    """A pickle of it touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    trap, path = tmp_path / "touched", tmp_path / "evil.pth"
    torch.save({"format": 1, "model": Evil(trap)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth was not loaded: it is damaged, or holds pickled code"):
        read(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap works"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_of_code_is_refused_and_not_run(tmp_path):
    trap, path = tmp_path / "touched", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(CheckpointError, match=r"evil\.pkl"):
        read(path)
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_damaged_by_name(saved, share):
    path = saved[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=f"{path} .*damaged"):
        read(path)


@pytest.mark.parametrize("alone", [False, True])
def test_a_flipped_bit_in_a_tensor_is_noticed_by_the_checksum_or_without_one(saved, alone):
    path, model, _ = saved
    if alone:
        sidecar(path).unlink()
    content = bytearray(path.read_bytes())
    at = content.index(model.first.weight.detach().numpy().tobytes())
    content[at + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} .*damaged"):
        read(path)


def test_noise_and_text_are_no_checkpoints(tmp_path):
    for name, content in (("noise", bytes(range(256)) * 9), ("text", b"weights"), ("empty", b"")):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}\.pth"):
            read(path)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=f"there is no checkpoint {path}"):
            read(path)


@pytest.mark.parametrize(("content", "kind"), [([1, 2], "list"), (torch.zeros(2), "Tensor"), (3, "int")])
def test_another_object_than_a_dictionary_is_no_checkpoint(tmp_path, content, kind):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth is not a checkpoint: it holds a {kind}"):
        read(tmp_path / "odd.pth")


@pytest.mark.parametrize("lacking", ["format", "model", "optimizer", "step", "settings"])
def test_a_checkpoint_without_what_a_run_needs_is_offered_as_weights(saved, lacking):
    path = saved[0]
    write(path, {k: v for k, v in read(path).items() if k != lacking})
    with pytest.raises(CheckpointError, match=f"{path} is not a checkpoint that a run can resume from: it lacks"):
        read_run(path)


@pytest.mark.parametrize("lacking", ["random_state", "loss"])
def test_a_checkpoint_without_random_state_or_loss_is_offered_as_weights_too(saved, lacking):
    path = saved[0]
    write(path, {k: v for k, v in read(path).items() if k != lacking})
    with pytest.raises(CheckpointError, match=f"{path} is not a checkpoint that a run can resume from: it lacks"):
        read_run(path)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_changes_nothing(saved):
    path = saved[0]
    model, optimizer = trained(width=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"wrong shape: first.weight is \(4, 3\), the model's \(5, 3\)") as caught:
        restore(path, read_run(path), model, optimizer)
    assert str(path) in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_of_another_format_says_so(saved):
    path = saved[0]
    write(path, {**read(path), "format": 2})
    with pytest.raises(CheckpointError, match=f"{path} has format 2, this version reads 1"):
        read_run(path)


def test_a_file_copied_alone_is_accepted_and_told(saved, caplog):
    path = saved[0]
    caplog.set_level("INFO", "spark_fast")
    read(path)
    assert not caplog.messages
    sidecar(path).unlink()
    assert read(path)["step"] == 5
    assert caplog.messages == [f"{path} has no checksum file (ckpt-last.pth.sha256): loaded without verifying it"]


def test_sha256sum_reads_the_checksum(saved):
    path = saved[0]
    done = subprocess.run(["sha256sum", "--check", sidecar(path).name], cwd=path.parent, capture_output=True, text=True)
    assert done.stdout == "ckpt-last.pth: OK\n", done.stderr


def test_a_snapshot_shares_nothing_with_what_the_next_step_changes(saved, tmp_path):
    _, model, optimizer = saved
    before = [v.clone() for v in [*model.state_dict().values(), *tensors(optimizer.state_dict())]]
    content = checkpoint.run_state(model, optimizer, step=5)
    addresses = {t.data_ptr() for t in tensors(content)}
    live = {t.data_ptr() for t in [*model.state_dict().values(), *tensors(optimizer.state_dict())]}
    assert not addresses & live
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    after = [*tensors(content["model"]), *tensors(content["optimizer"])]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not torch.equal(model.first.weight, content["model"]["first.weight"]), "the step did change something"


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


def test_a_snapshot_keeps_values_types_and_memory_format():
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"a": [image, 1], "b": (0.9, 0.95), "c": {"d": None, "e": "text"}}
    copy = snapshot(state)
    assert copy["a"][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy["a"][0], image)
    assert (copy["a"][1], copy["b"], copy["c"]) == (1, (0.9, 0.95), {"d": None, "e": "text"})


def test_the_size_of_a_checkpoint_is_told_before_it_is_written(saved):
    path, model, _ = saved
    size = checkpoint.tensor_bytes(read(path))
    moments = 2 * sum(p.nbytes for p in model.parameters())
    assert size >= moments + sum(v.nbytes for v in model.state_dict().values())
    assert size == sum(t.nbytes for t in tensors(read(path)))
    assert size < path.stat().st_size
