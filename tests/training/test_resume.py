"""Which checkpoint a run goes on from, and when it is told that this would be another run."""

import copy
from pathlib import Path

import pytest

from spark_fast.training.checkpoint import CheckpointError
from spark_fast.training.resume import HARMLESS, check_same_run, checkpoint_to_resume
from spark_fast.training.run_folder import CHECKPOINT
from spark_fast.training.settings import parse


def settings(*words):
    return parse(["name", "--data_path=images", *words])


def saved(*words, num_samples=10):
    return {"settings": settings(*words).to_dict(), "num_samples": num_samples}


def test_nothing_asked_is_a_fresh_start(tmp_path):
    (tmp_path / CHECKPOINT).touch()
    assert checkpoint_to_resume(settings(f"--exp_dir={tmp_path}")) is None


def test_auto_takes_the_run_folders_checkpoint_or_starts_afresh(tmp_path):
    asked = settings(f"--exp_dir={tmp_path}", "--resume=auto")
    assert checkpoint_to_resume(asked) is None
    (tmp_path / CHECKPOINT).touch()
    assert checkpoint_to_resume(asked) == tmp_path / CHECKPOINT


def test_a_named_checkpoint_is_taken_and_a_missing_one_is_an_error(tmp_path):
    path = tmp_path / "other.pth"
    asked = settings(f"--resume={path}")
    with pytest.raises(CheckpointError, match=f"there is no checkpoint {path} to resume from"):
        checkpoint_to_resume(asked)
    path.touch()
    assert checkpoint_to_resume(asked) == path


def test_the_same_settings_are_the_same_run():
    check_same_run(Path("x.pth"), saved("--bs=5"), settings("--bs=5"), 10)


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + ("x" if isinstance(value, str) else 1)


def changed():
    tree = settings().to_dict()
    return [(group, name) for group in tree for name in tree[group]]


@pytest.mark.parametrize(("group", "name"), changed())
def test_each_setting_is_harmless_or_named_as_a_difference(group, name):
    state = saved()
    then = copy.deepcopy(state["settings"])
    state["settings"][group][name] = other(then[group][name])
    if name in HARMLESS[group]:
        check_same_run(Path("x.pth"), state, settings(), 10)
        return
    with pytest.raises(CheckpointError, match=f"x.pth is of another run: {name} was") as caught:
        check_same_run(Path("x.pth"), state, settings(), 10)
    assert f"{state['settings'][group][name]!r}, is {then[group][name]!r}. Give" in str(caught.value)


MATTERS = {
    "ffcv_resize", "input_size", "batch_size", "model", "stages", "mask_ratio", "drop_path", "decoder_width", "epochs",
    "warmup_epochs", "base_lr", "optimizer", "beta2", "weight_decay", "weight_decay_end", "clip", "seed",
}  # fmt: skip


def test_what_decides_the_weights_is_never_harmless():
    assert {name for group, name in changed() if name not in HARMLESS[group]} == MATTERS


def test_where_and_how_fast_it_runs_may_change():
    then = saved("--exp_dir=a", "--workers=1", "--log_every=3", "--precision=fp32", "--encoder=masked")
    now = settings("--exp_dir=b", "--workers=2", "--log_every=1", "--precision=bf16", "--encoder=packed", "--resume=x")
    check_same_run(Path("x.pth"), then, now, 10)


def test_all_differences_are_told_at_once_and_the_data_among_them():
    with pytest.raises(CheckpointError) as caught:
        check_same_run(Path("x.pth"), saved("--bs=4", "--model=resnet18"), settings("--bs=5", "--ep=3"), 11)
    for part in ("batch_size was 4, is 5", "model was 'resnet18', is 'resnet50'", "epochs was 1600, is 3",
                 "the data had 10 images, now 11", "--init_weight"):  # fmt: skip
        assert part in str(caught.value)
