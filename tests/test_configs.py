"""configs/: files of published networks say what the recipes say; those for a kind of data can be trained with."""

import re
from pathlib import Path

import pytest
import torch

from spark_fast.cli import train
from spark_fast.errors import SettingsError
from spark_fast.method import build, method_class
from spark_fast.training.settings import Settings, parse
from tests.commands import run_here

FOLDER = Path(__file__).parents[1] / "configs"
PUBLISHED = ("spark", "fcmae")
FILES = sorted(path for folder in PUBLISHED for path in (FOLDER / folder).glob("*.toml"))
OF_DATA = {  # the file for a kind of data -> how many images it is for
    "1k_photographs": 1_000, "10k_photographs": 10_000, "100k_photographs": 100_000,
    "scans": 1_000, "satellites": 10_000,
}  # fmt: skip
ENOUGH = 2_000  # steps: what docs/tutorials/small_data.md asks for


def test_every_published_network_has_one():
    assert len(list((FOLDER / "spark").iterdir())) == 7
    assert len(list((FOLDER / "fcmae").iterdir())) == 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_is_what_its_method_and_network_take_by_default(path):
    """But for the epochs of FCMAE: the recipe's are fewer, as the paper's figures are of 1600."""
    settings = parse(["run", "--data_path=images", "--config", str(path)])
    assert (settings.model.method, settings.network) == (path.parent.name, path.stem)
    default = Settings.of_method(settings.model.method)
    default.model.model, default.optim.epochs = settings.model.model, settings.optim.epochs
    default.run.exp_name, default.data.data_path = "run", "images"
    assert settings.meaning() == default.meaning()
    assert re.search(r"the authors report \d\d\.\d % top-1", path.read_text(encoding="utf-8"))


def test_a_file_is_found_by_its_name_where_no_file_of_the_users_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "scans").mkdir(parents=True)  # a folder is no file
    assert parse(["run", "--data_path=images", "--config", "fcmae/convnextv2_atto"]).network == "convnextv2_atto"
    assert parse(["run", "--data_path=images", "--config=data/scans"]).data.in_chans == 1
    (tmp_path / "spark").mkdir()
    (tmp_path / "spark" / "resnet50").write_text("[data]\nin_chans = 7\n")
    assert parse(["run", "--data_path=images", "--config=spark/resnet50"]).data.in_chans == 7
    with pytest.raises(SettingsError, match="nor one of this name in spark_fast; did you mean spark/resnet152"):
        parse(["run", "--data_path=images", "--config=spark/resnet15"])


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_network_is_built(path):
    settings = parse(["run", "--data_path=images", "--config", str(path)])
    kind = method_class(settings.model.method)
    with torch.device("meta"):
        options = {name: getattr(settings.model, name) for name in kind.options}
        model = build(kind, settings.network, mask_ratio=settings.model.mask_ratio, check=False, **options)
    assert model.grid == (7, 7)


def test_there_is_one_for_each_kind_of_data():
    assert sorted(path.stem for path in (FOLDER / "data").iterdir()) == sorted(OF_DATA)


@pytest.mark.parametrize(("name", "images"), OF_DATA.items(), ids=list(OF_DATA))
def test_it_gives_steps_enough_and_says_how_many_and_where_its_numbers_come_from(name, images):
    path = FOLDER / "data" / f"{name}.toml"
    settings, text = parse(["run", "--data_path=images", "--config", str(path)]), path.read_text(encoding="utf-8")
    steps = settings.optim.epochs * (images // settings.data.batch_size)
    assert steps >= ENOUGH
    assert f"epochs = {settings.optim.epochs} # {steps:,} steps of {images:,} " in text
    assert 0.001 <= settings.optim.base_lr * settings.data.batch_size / 256 <= 0.0025
    assert "Where the numbers come from" in text
    assert "not tried" in text.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["scans", *(pytest.param(n, marks=pytest.mark.drill) for n in OF_DATA if n != "scans")]
)
def test_a_dry_run_of_it_ends_well(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--pipeline=synthetic", "--bs=2", "--threads=1", "--workers=1", "--dry_run", "--verify=never"]
    told = run_here(train.main, "run", "--config", str(FOLDER / "data" / f"{name}.toml"), *words, code=0).stdout
    assert "GMACs" in told
    assert not list(tmp_path.iterdir())
