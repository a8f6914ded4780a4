"""Batch augmentation and soft targets."""

import pytest
import torch

from spark_fast.evaluation.mixup import Augment, Mix
from spark_fast.evaluation.recipes import recipe_for

CPU = torch.device("cpu")


def test_without_strong_augmentation_images_stay_and_with_it_they_stay_images():
    _, _, recipe = recipe_for("resnet50", (32, 32))
    images = torch.randn(4, 3, 32, 32).clamp(-1.5, 1.5)
    recipe.__dict__.update(augment="none", erase=0.0)
    assert torch.equal(Augment(recipe, CPU)(images), images)
    for policy in ("trivial", "auto", "rand"):
        recipe.__dict__.update(augment=policy, erase=0.5)
        torch.manual_seed(0)
        changed = Augment(recipe, CPU)(images.clone())
        assert changed.shape == images.shape
        assert changed.isfinite().all()
        assert not torch.equal(changed, images)


def test_targets_are_smoothed_whether_or_not_images_are_mixed():
    _, _, recipe = recipe_for("resnet50", (32, 32))
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed, targets = Mix(recipe, 5)(images.clone(), labels)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    recipe.__dict__.update(mixup=0.0, cutmix=0.0)
    same, targets = Mix(recipe, 5)(images, labels)
    assert torch.equal(same, images)
    assert targets[2].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])
