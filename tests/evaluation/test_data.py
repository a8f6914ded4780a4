from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spark_fast.errors import DataError
from spark_fast.evaluation.data import Labelled, _numbers
from tests.pipelines.building import build
from tests.pipelines.pictures import jpeg


def images_of(folder, *classes: str, empty: tuple[str, ...] = ()):
    for name in (*classes, *empty):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(classes):
        (folder / name / f"{i}.jpg").write_bytes(jpeg(i, 16, 16))
    return build(folder, split="all", batch_size=1, input_size=32)


def test_classes_are_matched_by_name_and_an_empty_one_is_no_obstacle(tmp_path):
    train = images_of(tmp_path / "train", "bird", "cat", "dog", empty=("ant",))
    val = images_of(tmp_path / "val", "bird", "dog", empty=("Annotations", "cat"))
    numbers = _numbers("val", train, val, torch.device("cpu"))
    assert (train.classes, val.classes) == (["ant", "bird", "cat", "dog"], ["Annotations", "bird", "cat", "dog"])
    assert (train.empty_classes, val.empty_classes) == ({"ant"}, {"Annotations", "cat"})
    labels = torch.from_numpy(val._source.labels).long()
    assert [train.classes[i] for i in numbers[labels]] == ["bird", "dog"]
    train.close(), val.close()


def test_a_class_with_images_that_was_not_trained_is_an_error():
    train = SimpleNamespace(classes=["a"], num_classes=1)
    val = SimpleNamespace(classes=["a", "b", "c"], num_classes=3, empty_classes={"c"})
    with pytest.raises(DataError, match="val has 1 classes that the training images do not have: b"):
        _numbers("val", train, val, torch.device("cpu"))


def test_ranks_are_asked_equally_often_also_where_one_has_no_share_of_the_last_batch(tmp_path):
    for i in range(5):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 2}" / f"{i}.jpg").write_bytes(jpeg(i, 16, 16))
    found = []
    for rank in range(4):
        view = {"split": "all", "augment": False, "in_order": True}
        pipeline = build(tmp_path, batch_size=4, input_size=32, rank=rank, world_size=4, **view)
        asked = []
        labels = [label for _, part in Labelled(pipeline, 2, None, asked.append).epoch() for label in part.tolist()]
        pipeline.close()
        assert asked == [0, 1]
        found.append(labels)
    assert found == [[0], [0], [0], [1, 1]]
