"""The picture of an evaluation."""

import pytest
import torch

from spark_fast.evaluation.accuracy import Confusion
from spark_fast.evaluation.report import draw_confusion


@pytest.mark.parametrize("classes", [3, 60, 2500])
def test_the_picture_is_drawn_for_few_and_for_many_classes(tmp_path, classes):
    classes = torch.arange(classes)
    confusion = Confusion(len(classes), torch.stack([classes, classes, torch.ones_like(classes)], dim=1))
    draw_confusion(confusion, [], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
