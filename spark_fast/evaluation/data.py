"""The labelled images of an evaluation: training and validation images, with the same class numbers in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import Tensor

from spark_fast.errors import DataError
from spark_fast.evaluation.eval_settings import Evaluation
from spark_fast.pipelines import LoaderOptions, Pipeline, View
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.run.command import open_pipeline
from spark_fast.run.distributed import Ranks

SYNTHETIC_IMAGES = 1024
NO_LABELS = "has no labels: images must lie in class folders, or be listed with them"
REMEDY = "Classes are matched by name: give val/ the class folders of train/, or name other images with --val_path"


class Labelled:
    """Batches of images and labels, with a pulse for the watchdog.

    Args:
        numbers: (classes,) int64, the label of each class of the pipeline; None: the pipeline's own numbers.
        alive: called with the step before each batch; as often on every rank, even on one without a share of the
            last batch.
    """

    def __init__(
        self, pipeline: Pipeline, num_classes: int, numbers: Tensor | None, alive: Callable[[int], None]
    ) -> None:
        self.pipeline, self.num_classes, self._numbers, self._alive = pipeline, num_classes, numbers, alive

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, C, H, W) and (B,) int64, on the device."""
        with closing(self.pipeline.epoch(epoch)) as batches:
            for step in range(len(self.pipeline)):
                self._alive(step)
                if (batch := next(batches, None)) is None:
                    continue
                assert batch.labels is not None
                labels = batch.labels if self._numbers is None else self._numbers[batch.labels]
                yield batch.images, labels

    def seen_through(self, features: Callable[[Tensor], Tensor]) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        """epoch -> batches of features and labels; `features` maps images (B, C, H, W) to (B, F)."""
        return lambda epoch: ((features(images), labels) for images, labels in self.epoch(epoch))

    def close(self) -> None:
        """Stop threads and close files."""
        self.pipeline.close()


def central(settings: Evaluation, split: str = "train") -> View:
    """Every image of a split once, in order, centrally cropped as the settings say."""
    assert settings.data.crop_pct is not None  # the recipe's, unless asked for
    return View(split, augment=False, in_order=True, centre=settings.data.crop_pct)


def open_train(settings: Evaluation, ranks: Ranks, view: View, statistics: Statistics | None = None) -> Pipeline:
    """The training images of this rank, normalised by `statistics`, those that the weights were trained with.

    Raises:
        DataError: the images cannot be used, or have no labels.
    """
    pipeline = _open(settings, ranks, settings.data.data_path, view, statistics)
    if pipeline.num_classes == 0:
        pipeline.close()
        raise DataError(f"{settings.data.data_path} {NO_LABELS}")
    return pipeline


def open_val(settings: Evaluation, ranks: Ranks, train: Pipeline, alive: Callable[[int], None]) -> Labelled:
    """The validation images, centrally cropped, in order, each once.

    Raises:
        DataError: the images cannot be used, have no labels, or have classes that the training images have not.
    """
    path = settings.data.val_path or settings.data.data_path
    split = "all" if settings.data.val_path else "val"
    try:
        pipeline = _open(settings, ranks, path, central(settings, split), train.statistics)
    except DataError as error:
        more = "" if settings.data.val_path else ". (--val_path names the validation images, if they lie elsewhere)"
        raise DataError(f"{error}{more}") from error
    try:
        place = path if settings.data.val_path else f"{path}/val"
        return Labelled(pipeline, train.num_classes, _numbers(place, train, pipeline, ranks.device), alive)
    except DataError:
        pipeline.close()
        raise


def _open(settings: Evaluation, ranks: Ranks, path: str, view: View, statistics: Statistics | None) -> Pipeline:
    options = LoaderOptions(settings.batch_size, synthetic_samples=SYNTHETIC_IMAGES, view=view, statistics=statistics)
    return open_pipeline(settings, ranks, path, options)


def _numbers(path: str, train: Pipeline, val: Pipeline, device: torch.device) -> Tensor | None:
    """For each class of `val` its number in `train`, (classes,) int64, by name; None where the numbers are the same."""
    if val.num_classes == 0:
        raise DataError(f"{path} {NO_LABELS}")
    if train.classes and val.classes:
        unknown = sorted(set(val.classes) - set(train.classes) - val.empty_classes)
        if unknown:
            raise DataError(
                f"{path} has {len(unknown)} classes that the training images do not have: {', '.join(unknown[:5])}"
                f"{f' and {len(unknown) - 5} more' if unknown[5:] else ''}. {REMEDY}"
            )
        number = {name: i for i, name in enumerate(train.classes)}
        return torch.tensor([number.get(name, -1) for name in val.classes], device=device)  # -1: without an image
    if val.num_classes > train.num_classes:
        raise DataError(f"{path} has {val.num_classes} classes, the training images {train.num_classes}. {REMEDY}")
    return None
