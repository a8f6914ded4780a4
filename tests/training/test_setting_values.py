"""What a setting may be: its range, its form, and what it does not go together with."""

from pathlib import Path

import pytest

from spark_fast.errors import SettingsError
from spark_fast.training.settings import parse

NAMED = ["name", "--data_path=images"]


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("64x96", (64, 96)), ("320x32", (320, 32))])
def test_an_input_size_is_one_number_or_two(text, size):
    assert parse([*NAMED, f"--input_size={text}"]).size == size


@pytest.mark.parametrize("text", ["big", "0", "0x64", "-64", "64x", "x64", "64x64x3", "64.0", "64 x 64", ""])
def test_an_input_size_of_another_form_is_refused(text):
    with pytest.raises(SettingsError, match=f"--input_size must be N or HxW in pixels, got '{text}'"):
        parse([*NAMED, f"--input_size={text}"])


def test_a_width_of_zero_is_refused():
    with pytest.raises(SettingsError, match="--input_size must be N or HxW in pixels, got '64x0'"):
        parse([*NAMED, "--input_size=64x0"])


POSITIVE = ["batch_size", "workers", "prefetch", "decoder_width", "epochs", "base_lr", "accumulate", "log_every"]
POSITIVE += ["max_bad_steps", "timeout"]
NOT_NEGATIVE = ["eval_every", "warmup_epochs", "weight_decay", "weight_decay_end", "clip", "threads", "keep_every"]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", POSITIVE)
def test_some_settings_must_be_positive(name, value):
    with pytest.raises(SettingsError, match=f"--{name} must be positive, got {value}"):
        parse([*NAMED, f"--{name}={value}"])


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_some_settings_may_be_zero_but_not_negative(name):
    parse([*NAMED, f"--{name}=0"])
    with pytest.raises(SettingsError, match=f"--{name} must not be negative, got -1"):
        parse([*NAMED, f"--{name}=-1"])


@pytest.mark.parametrize(("name", "value"), [("base_lr", "nan"), ("clip", "nan"), ("mask_ratio", "nan"),
                                             ("drop_path", "nan"), ("beta2", "nan")])  # fmt: skip
def test_no_number_is_in_no_range(name, value):
    with pytest.raises(SettingsError, match=f"--{name} must .*got nan"):
        parse([*NAMED, f"--{name}={value}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--eval_every=5"], "--eval_every 5 needs --val_path"), (["--val_path=v"], "--val_path v needs --eval_every"),
     (["--eval_every=-1", "--val_path=v"], "--eval_every must not be negative, got -1")],
)  # fmt: skip
def test_an_evaluation_needs_images_and_how_often(words, message):
    with pytest.raises(SettingsError, match=message):
        parse([*NAMED, *words])
    found = parse([*NAMED, "--eval_every=5", "--val_path=v"])
    assert (found.run.eval_every, found.data.val_path) == (5, "v")


@pytest.mark.parametrize("value", ["0.0", "1.0", "1.5", "-0.1"])
def test_the_mask_ratio_lies_between_0_and_1(value):
    with pytest.raises(SettingsError, match=f"--mask_ratio must be between 0 and 1, got {value}"):
        parse([*NAMED, f"--mask={value}"])


@pytest.mark.parametrize("value", ["1.0", "-0.5"])
@pytest.mark.parametrize("name", ["drop_path", "beta2"])
def test_rates_lie_below_1(name, value):
    with pytest.raises(SettingsError, match=f"--{name} must be at least 0 and below 1, got {value}"):
        parse([*NAMED, f"--{name}={value}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--data_path=c"], "needs a name: spark-fast-train <experiment_name>"),
     (["name"], "--data_path is missing"),
     ([*NAMED, "--resume=a", "--init_weight=b"], "choose one of them")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        parse(words)


def test_a_folder_stands_for_a_name_and_synthetic_images_need_no_path():
    assert parse(["--exp_dir=here", "--pipeline=synthetic"]).folder == Path("here")


@pytest.mark.parametrize(
    ("text", "expected"), [("0", (0, 0)), ("500", (500, 0)), ("10min", (0, 600)), ("0min", (0, 0))]
)
def test_saves_are_counted_in_steps_or_minutes(text, expected):
    assert parse([*NAMED, f"--save_every={text}"]).save_every == expected


@pytest.mark.parametrize("text", ["-1", "10s", "min", "1.5", "10 min", ""])
def test_saves_counted_otherwise_are_refused(text):
    with pytest.raises(SettingsError, match=rf"--save_every must be steps \(500\) or minutes \(10min\), got '{text}'"):
        parse([*NAMED, f"--save_every={text}"])


@pytest.mark.parametrize("number", [1, 0, -1])
def test_fewer_than_two_checkpoints_are_never_kept(number):
    with pytest.raises(SettingsError, match=f"--keep_last must be 2 or more.*got {number}"):
        parse([*NAMED, f"--keep_last={number}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--in_chans=0"], "--in_chans must be positive, got 0"),
        (["--picture_channels", "0", "1"], "--picture_channels must be one or three of the channels 0 to 2, got 0 1"),
        (["--in_chans=2", "--picture_channels", "2"], "of the channels 0 to 1, got 2"),
    ],
)
def test_channels_that_there_are_not_are_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        parse([*NAMED, *words])
