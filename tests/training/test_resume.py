"""Which checkpoint a run goes on from, and when it is told that this would be another run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from spark_fast.checkpoint.file import FORMAT, RUN_STATE, write
from spark_fast.checkpoint.manager import CHECKPOINT, FOLDER, read_newest
from spark_fast.errors import CheckpointError
from spark_fast.training.resume import HARMLESS, check_same_run, checkpoints_to_resume, in_published_names
from spark_fast.training.settings import parse
from spark_fast.versions import versions


def to_resume(chosen):
    return checkpoints_to_resume(chosen.run.resume, chosen.folder)


def settings(*words):
    return parse(["name", "--data_path=images", *words])


DATA = SimpleNamespace(num_samples=10, listing="sha256")


def saved(*words):
    return {"settings": settings(*words).to_dict(), "num_samples": 10, "listing": "sha256"}


def checkpoint(path, step=1):
    content = dict.fromkeys(RUN_STATE, 0) | {"format": FORMAT, "step": step}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)
    return path


def test_the_published_names_have_what_a_default_stands_for():
    assert in_published_names(settings())["wp_ep"] == 40
    assert in_published_names(settings("--wp_ep=7"))["wp_ep"] == 7


def test_nothing_asked_is_a_fresh_start(tmp_path):
    (tmp_path / CHECKPOINT).touch()
    assert to_resume(settings(f"--exp_dir={tmp_path}")) == []


def test_auto_takes_the_run_folders_checkpoints_the_newest_first_or_starts_afresh(tmp_path):
    asked = settings(f"--exp_dir={tmp_path}", "--resume=auto")
    assert to_resume(asked) == []
    old = checkpoint(tmp_path / CHECKPOINT)
    assert to_resume(asked) == [old]
    one, two = (checkpoint(tmp_path / FOLDER / f"step_{n:08d}.pth", n) for n in (9, 10))
    assert to_resume(asked) == [two, one, old]


def test_a_named_checkpoint_is_taken_and_a_missing_one_is_an_error(tmp_path):
    path = tmp_path / "other.pth"
    asked = settings(f"--resume={path}")
    with pytest.raises(CheckpointError, match=f"there is no checkpoint {path} to resume from"):
        to_resume(asked)
    path.touch()
    assert to_resume(asked) == [path]
    with pytest.raises(CheckpointError, match="no checkpoint Auto to resume from; did you mean auto"):
        to_resume(settings("--resume=Auto"))
    last = checkpoint(tmp_path / "run" / CHECKPOINT)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'run'} is a folder: name one .*, as {last}"):
        to_resume(settings(f"--resume={tmp_path / 'run'}"))


def test_the_newest_that_can_be_read_is_used_and_the_others_are_named(tmp_path, caplog):
    paths = [checkpoint(tmp_path / f"{n}.pth", n) for n in (3, 2, 1)]
    assert read_newest(paths)[1]["step"] == 3
    assert not caplog.messages
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    path, state = read_newest(paths)
    assert (path, state["step"]) == (paths[1], 2)
    (message,) = caplog.messages
    assert message.startswith(f"{paths[0]} is damaged")
    assert message.endswith(f"using the previous checkpoint, {paths[1]}")


def test_where_none_can_be_read_each_is_named(tmp_path):
    paths = [checkpoint(tmp_path / f"{n}.pth", n) for n in (2, 1)]
    for path in paths:
        path.write_bytes(b"noise")
    with pytest.raises(CheckpointError, match=f"no usable checkpoint in {tmp_path}: {paths[0]} .*; {paths[1]} "):
        read_newest(paths)


def test_the_same_settings_are_the_same_run():
    check_same_run(Path("x.pth"), saved("--bs=5"), settings("--bs=5"), DATA)


# another valid value of each setting
OTHER = {
    "input_size": "64", "model": "resnet18", "encoder": "masked", "optimizer": "sgd", "pipeline": "dali",
    "verify": "never", "ffcv_resize": "area", "device": "cpu", "precision": "bf16",
    "crop_scale": (0.3, 1.0), "scale": "none", "mean": (1.0, 2.0, 3.0), "std": (1.0, 2.0, 3.0),
    "picture_channels": (0,), "mask_ratio": 0.7, "drop_path": 0.3, "beta2": 0.5, "warmup_epochs": 7,
}  # fmt: skip


def other(name, value):
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + ("x" if isinstance(value, str) else 1)


def changed():
    tree = settings().to_dict()
    return [(group, name) for group in tree for name in tree[group]]


@pytest.mark.parametrize(("group", "name"), changed())
def test_each_setting_is_harmless_or_named_as_a_difference(group, name):
    state = saved()
    state["settings"][group][name] = other(name, state["settings"][group][name])
    if name in HARMLESS[group]:
        check_same_run(Path("x.pth"), state, settings(), DATA)
        return
    with pytest.raises(CheckpointError, match=rf"x.pth belongs to another run: (.*; )?{name} was .*, is .*\. Use"):
        check_same_run(Path("x.pth"), state, settings(), DATA)


def test_another_spelling_of_the_same_is_no_difference():
    then = saved("--model=res50", "--input_size=224", "--sparse_conv=1")
    check_same_run(Path("x.pth"), then, settings("--input_size=224x224", "--encoder=sparseconvnet", "--dp=0.05"), DATA)


def test_settings_of_a_later_version_are_named():
    state = saved()
    state["settings"]["model"]["wings"] = 2
    with pytest.raises(CheckpointError, match=r"x.pth has settings that this version cannot read .*wings"):
        check_same_run(Path("x.pth"), state, settings(), DATA)


def test_other_versions_are_told_and_go_on(caplog):
    check_same_run(Path("x.pth"), {**saved(), "versions": versions()}, settings(), DATA)
    assert not caplog.messages
    check_same_run(Path("x.pth"), {**saved(), "versions": {**versions(), "torch": "1.0"}}, settings(), DATA)
    (message,) = caplog.messages
    assert f"torch 1.0 (now {versions()['torch']})" in message


def test_other_images_for_batch_norms_are_told_and_go_on(caplog):
    check_same_run(Path("x.pth"), {**saved(), "versions": versions()}, settings("--accumulate=2", "--sbn=0"), DATA)
    assert caplog.messages == [
        f"{name} was {before}, is {now}: batch norms take their statistics over other images from here on"
        for name, before, now in (("accumulate", 1, 2), ("sync_batchnorm", True, False))
    ]


MATTERS = {
    "crop_scale", "hflip", "vflip", "rot90", "scale", "mean", "std", "channels_first", "npz_key", "shuffle_block",
    "ffcv_resize", "input_size", "in_chans", "min_crop", "batch_size", "method", "masks_per_image", "decoder_depth",
    "model", "stages", "mask_ratio", "drop_path", "decoder_width", "epochs",
    "warmup_epochs", "base_lr", "optimizer", "beta2", "weight_decay", "weight_decay_end", "clip", "seed",
}  # fmt: skip


def test_what_decides_the_weights_is_never_harmless():
    assert {name for group, name in changed() if name not in HARMLESS[group]} == MATTERS


def test_where_and_how_fast_it_runs_may_change():
    then = saved("--exp_dir=a", "--workers=1", "--log_every=3", "--precision=fp32", "--encoder=masked")
    now = settings("--exp_dir=b", "--workers=2", "--log_every=1", "--precision=bf16", "--encoder=packed", "--resume=x")
    check_same_run(Path("x.pth"), then, now, DATA)


def test_all_differences_are_told_at_once_and_the_data_among_them():
    more = SimpleNamespace(num_samples=11, listing="another")
    with pytest.raises(CheckpointError) as caught:
        check_same_run(Path("x.pth"), saved("--bs=4", "--model=resnet18"), settings("--bs=5", "--ep=3"), more)
    for part in ("batch_size was 4, is 5", "model was 'resnet18', is 'resnet50'", "epochs was 1600, is 3",
                 "the data had 10 images, now 11", "--init_weight"):  # fmt: skip
        assert part in str(caught.value)


def test_as_many_other_images_are_another_run_where_it_is_known():
    with pytest.raises(CheckpointError, match="the data are 10 different images: names or labels differ"):
        check_same_run(Path("x.pth"), saved(), settings(), SimpleNamespace(num_samples=10, listing="another"))
    check_same_run(Path("x.pth"), saved(), settings(), SimpleNamespace(num_samples=10, listing=""))
    before = saved()
    del before["listing"]  # a checkpoint written before it was kept
    check_same_run(Path("x.pth"), before, settings(), DATA)


def test_images_of_another_number_of_channels_are_named_and_what_older_versions_wrote_had_three():
    state = saved()
    del state["settings"]["data"]["in_chans"]
    check_same_run(Path("x.pth"), state, settings(), DATA)
    with pytest.raises(CheckpointError, match=r"in_chans was 3, is 4\. Use"):
        check_same_run(Path("x.pth"), state, settings("--in_chans=4"), DATA)
