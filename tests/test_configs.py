"""The published networks' settings: each file is read, says what its method's recipe says, and its network is built."""

import re
from pathlib import Path

import pytest
import torch

from spark_fast.method import build, method_class
from spark_fast.training.settings import Settings, parse

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.toml"))


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


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_network_is_built(path):
    settings = parse(["run", "--data_path=images", "--config", str(path)])
    kind = method_class(settings.model.method)
    with torch.device("meta"):
        options = {name: getattr(settings.model, name) for name in kind.options}
        model = build(kind, settings.network, mask_ratio=settings.model.mask_ratio, check=False, **options)
    assert model.grid == (7, 7)
