"""The picture of an evaluation."""

import pytest
import torch

from spark_fast.evaluation.report import draw_confusion


@pytest.mark.parametrize("classes", [3, 60])
def test_the_picture_is_drawn_for_few_and_for_many_classes(tmp_path, classes):
    draw_confusion(torch.eye(classes, dtype=torch.int64), [], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
