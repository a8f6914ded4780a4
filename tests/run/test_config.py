"""How words become settings: switches, names from Python, and what may have been meant."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spark_fast.errors import SettingsError
from spark_fast.evaluation import eval_settings
from spark_fast.run.config import (
    _flags_of,
    _text_of,
    nearest,
    plain_switches,
    set_by_name,
    switches_of,
    take_option,
)
from spark_fast.training import settings
from spark_fast.training.settings import Settings


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        (["--sbn=1"], ["--sbn"]),
        (["--sbn", "True", "--ep=3"], ["--sbn", "--ep=3"]),
        (["--sbn=0"], ["--no_sbn"]),
        (["--sbn", "false"], ["--no_sbn"]),
        (["--sbn"], ["--sbn"]),
        (["--sbn", "--ep", "1"], ["--sbn", "--ep", "1"]),
        (["--ep", "0"], ["--ep", "0"]),
    ],
)
def test_switches_of_old_command_lines_become_plain_flags(words, plain):
    assert plain_switches(words, switches_of("sbn")) == plain


@pytest.mark.parametrize("words", [["--a", "--config", "x", "--b"], ["--a", "--config=x", "--b"]])
def test_an_option_is_taken_out_of_the_words(words):
    assert take_option(words, "--config") == ("x", ["--a", "--b"])
    assert take_option(["--a"], "--config") == (None, ["--a"])


def test_what_may_have_been_meant_is_told_or_all_there_is():
    assert nearest("epoch", ["epochs", "seed"]) == "; did you mean epochs?"
    assert nearest("zzz", ["b", "a"]) == "; choose one of a, b"


def test_settings_are_set_by_name_whatever_their_group_and_in_pythons_types():
    settings = Settings()
    given = {"data_path": Path("images"), "input_size": (96, 128), "mask_ratio": 0.5, "clip": 3, "zero": True}
    set_by_name(settings, given)
    assert (settings.data.data_path, settings.data.input_size, settings.size) == ("images", "96x128", (96, 128))
    assert (settings.model.mask_ratio, settings.optim.zero) == (0.5, True)
    assert settings.optim.clip == 3.0
    assert isinstance(settings.optim.clip, float)


@dataclass
class Numbers:
    """A group with settings of several numbers."""

    whole: tuple[int, ...] = ()
    parts: tuple[float, ...] = ()


@dataclass
class Several:
    """A tree of it."""

    numbers: Numbers = field(default_factory=Numbers)


def test_several_numbers_are_set_by_a_list_or_a_tuple():
    settings = Several()
    set_by_name(settings, {"whole": [0, 2], "parts": (1, 0.5)})
    assert settings.numbers == Numbers((0, 2), (1.0, 0.5))
    assert isinstance(settings.numbers.parts[0], float)
    for given in ({"whole": 3}, {"whole": [0.5]}, {"parts": ["1"]}, {"whole": (True,)}):
        (name,) = given
        with pytest.raises(SettingsError, match=f"{name} must be a list of (int|float), got "):
            set_by_name(settings, given)


def test_a_file_gives_several_numbers_as_a_list(tmp_path):
    (tmp_path / "it.toml").write_text("[numbers]\nwhole = [0, 2]\nparts = []\n")
    assert _flags_of(tmp_path / "it.toml", Several()) == ["--whole", "0", "2", "--parts"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero": 1}, "zero must be of type bool, got 1"),
        ({"epochs": True}, "epochs must be of type int, got True"),
        ({"seed": 1.0}, r"seed must be of type int, got 1\.0"),
        ({"encoder": "dense"}, "encoder must be one of 'packed', 'masked', 'sparseconvnet', got 'dense'"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(given, message):
    with pytest.raises(SettingsError, match=message):
        set_by_name(Settings(), given)


def test_a_file_is_utf_8_and_its_paths_are_those_of_the_command_line_in_every_locale(monkeypatch):
    raw = 'data_path = "Bilder ü"'.encode()
    assert _text_of(raw) == 'data_path = "Bilder ü"'

    def of_an_ascii_locale(text):
        return text.encode("ascii", "surrogateescape")

    monkeypatch.setattr(os, "fsencode", of_an_ascii_locale)
    monkeypatch.setattr(os, "fsdecode", lambda raw: raw.decode("ascii", "surrogateescape"))
    assert of_an_ascii_locale(_text_of(raw)) == raw


@pytest.mark.parametrize("parsed", [settings.parse, lambda words: eval_settings.parse(["knn", *words])])
def test_seeds_have_63_bits(parsed):
    words = ["name", "--data_path=images", "--weights=none"][: 2 + (parsed is not settings.parse)]
    words.append("--model=resnet50")
    assert parsed([*words, f"--seed={2**63 - 1}"]).run.seed == 2**63 - 1
    with pytest.raises(SettingsError, match=r"--seed must be below 2\*\*63, got 9223372036854775808"):
        parsed([*words, f"--seed={2**63}"])
    with pytest.raises(SettingsError, match="--seed must not be negative, got -1"):
        parsed([*words, "--seed=-1"])
