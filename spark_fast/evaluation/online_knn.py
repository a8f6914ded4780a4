"""k-NN while an encoder is pre-trained: the figures of `spark-fast-eval knn` for the checkpoint of the same step.

The network is built a second time, as that command builds it, and takes over the weights for each measurement. So
nothing of the run is touched: its mode and batch statistics, its compiled code, its CUDA graph. The price is the memory
of one encoder without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spark_fast.errors import DataError
from spark_fast.evaluation import eval_settings
from spark_fast.evaluation.backbone import build_backbone
from spark_fast.evaluation.data import Labelled, central, open_train, open_val
from spark_fast.evaluation.eval_settings import Knn
from spark_fast.evaluation.features import extract, frozen
from spark_fast.evaluation.knn import classify_by_neighbours
from spark_fast.pipelines.build import holds_split
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.listing.image_names import listed
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.run.distributed import Ranks
from spark_fast.training.settings import Settings

FIFTH = 5
SHOWN = 5  # names in a message


class OnlineKnn:
    """An `Evaluator`: the neighbours are the training images of `--val_path`, the queries its validation images.

    Where it holds none, the queries are the images of `every_fifth`, and the neighbours all others.

    Args:
        settings: of the run.
        dtype: what the network computes in.
        statistics: of the images that the run sees, by which these are scaled too.
        alive: called before each batch, equally often on all ranks; what it raises ends a measurement.

    Raises:
        DataError: images that k-NN can say nothing of: without labels, of one class, too few, of other classes.
        SettingsError: the network cannot be built.
    """

    def __init__(
        self,
        settings: Settings,
        ranks: Ranks,
        dtype: torch.dtype,
        alive: Callable[[int], None],
        statistics: Statistics | None = None,
    ) -> None:
        asked, self._statistics = as_evaluation(settings, ranks), statistics
        self._ranks, self._alive, self._settings = ranks, alive, asked.knn
        self._val: Labelled | None = None
        with ExitStack() as closing:
            try:
                self._open(asked, closing)
            except DataError as error:
                raise DataError(f"--val_path: {error}") from error
            with _random_numbers_kept(ranks):
                backbone = build_backbone(asked.network, asked.model.stages, None, asked.in_chans)
            self._network, self._features = backbone.network, frozen(backbone, ranks.device, dtype)
            self.close = closing.pop_all().close

    def _open(self, asked: Knn, closing: ExitStack) -> None:
        """Open the images, and refuse those that k-NN can say nothing of."""
        ranks, path = self._ranks, asked.data.data_path
        train = open_train(asked, ranks, central(asked), self._statistics)
        closing.callback(train.close)
        self._train = Labelled(train, train.num_classes, None, self._alive)
        _check_classes(path, train.num_classes, train.empty_classes)
        assert train.labels is not None  # of what has classes
        queries = every_fifth(train.labels)
        known, count = int((~queries).sum()), int(queries.sum())
        if holds_split(path, "val"):
            self._val = open_val(asked, ranks, train, self._alive)
            closing.callback(self._val.close)
            known, count = train.num_samples, self._val.pipeline.num_samples
        _check_sizes(path, known, count, self._settings.k)
        sampler = Sampler(train.num_samples, asked.batch_size, 0, ranks.rank, ranks.world_size, in_order=True)
        own = [share.ids for share in sampler.epoch(0)]  # the images whose features this rank has, in their order
        self._queries = torch.from_numpy(queries[np.concatenate(own)] if own else queries[:0]).to(ranks.device)
        self.about = f"k-NN of {count} images among {known} of {path}"

    def measure(self, network: nn.Module) -> dict[str, float]:
        """See `Evaluator`: `knn_top1` and `knn_top5`."""
        with _random_numbers_kept(self._ranks):
            self._take_over(network)
            bank = extract(self._features, self._train)
            if self._val is None:
                bank, queries = _rows(bank, ~self._queries), _rows(bank, self._queries)
            else:
                queries = extract(self._features, self._val)
        found = classify_by_neighbours(
            bank,
            queries,
            k=self._settings.k,
            temperature=self._settings.temperature,
            classes=self._train.num_classes,
            ranks=self._ranks,
            alive=self._alive,
        ).accuracy()
        return {"knn_top1": found["top1"], "knn_top5": found["top5"]}

    def unreadable(self) -> list[str]:
        """See `Evaluator`."""
        data = [self._train] if self._val is None else [self._train, self._val]
        own = [name for part in data for name in part.pipeline.bad_images.first_substituted]
        return [name for of_rank in self._ranks.gather(own) for name in of_rank][:SHOWN]

    def _take_over(self, network: nn.Module) -> None:
        """The weights as they are, and the batch statistics of the first rank, whose checkpoint is the run's."""
        self._network.load_state_dict(network.state_dict())
        for buffer in self._network.buffers():
            buffer.copy_(self._ranks.first(buffer))


def as_evaluation(settings: Settings, ranks: Ranks) -> Knn:
    """The settings of `spark-fast-eval knn` that stand for the evaluation of a run."""
    data, run = settings.data, settings.run
    asked = Knn(
        data=eval_settings.Data(
            data_path=data.val_path,
            input_size=data.input_size,
            workers=data.workers,
            worker_processes=data.worker_processes,
            prefetch=data.prefetch,
            max_bad_fraction=data.max_bad_fraction,
            max_pixels=data.max_pixels,
            cache_dir=data.cache_dir,
            cache_size=data.cache_size,
            scale=data.scale,
            mean=data.mean,
            std=data.std,
            channels_first=data.channels_first,
            npz_key=data.npz_key,
        ),
        run=eval_settings.Run(seed=run.seed),
    ).resolved(settings.network, settings.model.stages, settings.in_chans)
    asked.data.batch_size = max(asked.batch_size // ranks.world_size, 1) * ranks.world_size  # equal shares
    return asked


def every_fifth(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which images are the queries of a set without a split: of each class the 5th, 10th ..., as they are listed; (n,).

    Args:
        labels: (n,)
    """
    order = np.argsort(labels, kind="stable")
    grouped = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(grouped, grouped)  # within its class, from 0
    found = np.empty(len(labels), bool)
    found[order] = place % FIFTH == FIFTH - 1
    return found


def _rows(table: tuple[Tensor, Tensor], which: Tensor) -> tuple[Tensor, Tensor]:
    return table[0][which], table[1][which]


def _random_numbers_kept(ranks: Ranks):
    """A context that restores the random generators at its end."""
    return torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else [])


def _check_classes(path: str, classes: int, empty: set[str]) -> None:
    if classes < 2:
        raise DataError(f"{path} has images of one class only: k-NN needs two, as folders or in a list")
    if empty:
        raise DataError(
            f"{path}: {len(empty)} classes have no image to learn from ({listed(sorted(empty))}): remove their "
            f"folders, or add images"
        )


def _check_sizes(path: str, known: int, queries: int, k: int) -> None:
    if not queries:
        raise DataError(
            f"{path}: no class has {FIFTH} images, so there are no queries. Add images, or use train/ and val/"
        )
    if known < k:
        raise DataError(f"{path}: {known} images to learn from are fewer than the {k} neighbours of k-NN")
