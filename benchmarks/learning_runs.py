"""What `learning.py` runs, each by the product's own parts in one process: data, pre-training, fine-tuning, a step.

The variants of the ablations live here and not in the product: each changes one thing and keeps the rest.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import clock, medians
from torch import Tensor
from ways import Shape, Way, inputs, train_step

from spark_fast.encoder import Encoder, MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.evaluation import eval_settings as evaluation
from spark_fast.evaluation.accuracy import judge
from spark_fast.evaluation.backbone import build_classifier
from spark_fast.evaluation.data import Labelled, open_train, open_val
from spark_fast.evaluation.finetune import FinetuneRun
from spark_fast.evaluation.recipes import Recipe
from spark_fast.evaluation.report import Report
from spark_fast.networks import build_network
from spark_fast.pipelines import Pipeline, View
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.run.distributed import Ranks
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.spark import SparK
from spark_fast.training import settings as training
from spark_fast.training.pretrain import open_images
from spark_fast.training.pretrain_run import PretrainRun
from spark_fast.training.step import DTYPES, resolve_precision
from spark_fast.weights.read import read_weights
from spark_fast.weights.timm_keys import encoder_state_dict, write_encoder

SIZE = 64  # pixels
STAGES = 2  # patches of 8 px
WATCHED = 10  # images a class that a run in progress is judged by; nothing is chosen by them
HELD_OUT = 200  # images a class, at most a fifth, that the sweep of rates is judged by and never learns from
WARMUP = 0.1  # of a run: where the whole is an epoch, a part of that
TIMEOUT = 600.0


class ZeroedEncoder(MaskedEncoder):
    """Zero-outing: the ordinary dense network on an image with its masked pixels zeroed."""

    def forward(self, images: Tensor, visible: VisiblePatches | None = None) -> list[Tensor]:
        """As of any encoder; no layer knows of the mask, and what they left in the holes is dropped at the end."""
        if visible is None:
            return super().forward(images)
        return self._leave(super().forward(self._enter(images, visible)), visible)


class LastLevelEncoder(PackedEncoder):
    """No hierarchy: the decoder is fed from the last level alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels, self.channels, self.strides = self.levels[-1:], self.channels[-1:], self.strides[-1:]


class LossOnAllPatches(SparK):
    """The loss is taken on visible patches, too."""

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        patches = torch.arange(self.grid[0] * self.grid[1], device=images.device).expand(len(images), -1)
        return self.loss(images, self.visible_patches(images, visible), on=VisiblePatches(patches, self.grid))


PUBLISHED = "as published"
VARIANTS: dict[str, tuple[type[Encoder], type[SparK]]] = {
    PUBLISHED: (PackedEncoder, SparK),
    "zero-outing": (ZeroedEncoder, SparK),
    "no hierarchy": (LastLevelEncoder, SparK),
    "loss on all patches": (PackedEncoder, LossOnAllPatches),
}


@dataclass(frozen=True)
class Pretraining:
    """One pre-training; `seed` decides weights, order, crops and masks."""

    network: str
    epochs: int
    width: int  # of the decoder
    variant: str = PUBLISHED
    mask: float = 0.6
    seed: int = 0
    images: float = 1.0  # share of the training images, the same for every seed

    @property
    def work(self) -> float:
        """About, in epochs of fine-tuning: the decoder makes a step cost some three times as much."""
        return 3.0 * self.epochs * self.images

    @property
    def name(self) -> str:
        """Of its folder."""
        words = (self.network, self.variant, f"mask {self.mask}", f"width {self.width}", f"{self.epochs} epochs")
        return "_".join((*words, f"{self.images:.0%} of the images", f"seed {self.seed}")).replace(" ", "-")


@dataclass(frozen=True)
class Finetuning:
    """One fine-tuning, `before` of what was pre-trained, or from scratch; `seed` decides the labelled images, too."""

    network: str
    before: Pretraining | None
    share: float  # of the training images, labelled
    epochs: int
    lr: float
    seed: int
    held_out: bool = False  # judged by training images that are never learned from

    @property
    def work(self) -> float:
        """About, in epochs over all images: the tenth is for judging."""
        return self.share * self.epochs + 0.1


class Images:
    """The data set: its JPEGs as they came, and as the converter stored them.

    Args:
        source: a tar, or a folder, with train/ and test/ (or val/) of class folders.
        out: where a tar is unpacked, and the shards go.
    """

    def __init__(self, source: Path, out: Path) -> None:
        self.root = source if source.is_dir() else _unpacked(source, out / "images")
        self.shards = out / "shards"
        convert(self.root, self.shards, ConvertSettings(), workers=len(os.sched_getaffinity(0)))
        self.test = next(self.shards / split for split in ("test", "val") if (self.shards / split).is_dir())
        self._lists = out / "lists"
        folders = sorted(path for path in (self.root / "train").iterdir() if path.is_dir())
        mixed = np.random.default_rng(0)
        self._classes = [mixed.permutation(sorted(f.iterdir())).tolist() for f in folders]

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def labelled(self, share: float, seed: int, held_out: bool) -> Path:
        """Training images with labels, equally many of each class: shards of all, or a list of a share of them."""
        if share == 1 and not held_out:
            return self.shards / "train"
        random = np.random.default_rng(seed)
        free = [images[self._kept(images) :] for images in self._classes] if held_out else self._classes
        chosen = [
            random.permutation(c)[: round(share * len(all_))] for c, all_ in zip(free, self._classes, strict=True)
        ]
        return self._list(f"labelled-{share:g}-{seed}{'-free' if held_out else ''}", chosen)

    def some(self, share: float) -> Path:
        """A share of the training images to pre-train on."""
        return self.shards if share == 1 else self.labelled(share, 0, False)

    def watched(self) -> Path:
        """A list of a few training images."""
        return self._list("watched", [images[:WATCHED] for images in self._classes])

    def held_out(self) -> Path:
        """A list of the training images that the sweep is judged by."""
        return self._list("held-out", [images[: self._kept(images)] for images in self._classes])

    @staticmethod
    def _kept(images: list) -> int:
        return min(HELD_OUT, len(images) // 5)

    def _list(self, name: str, classes: list) -> Path:
        lines = [f"{Path(p).relative_to(self.root)} {label}\n" for label, paths in enumerate(classes) for p in paths]
        path = self.root / f"{name}.txt"  # a list stands at the top of its images' folder
        written = path.with_suffix(f".{os.getpid()}")  # another process may be reading the list
        written.write_text("".join(lines), encoding="utf-8")
        written.replace(path)
        return path


def _unpacked(tar: Path, folder: Path) -> Path:
    done = folder / "unpacked"
    if not done.exists():
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
        done.touch()
    return next(path.parent for path in sorted(folder.glob("**/train")))


class Bench:
    """Where everything runs: the data, the device, and what all runs share."""

    def __init__(self, images: Images, out: Path, device: torch.device, options: Any) -> None:
        self.images, self.out, self.options = images, out, options
        self.ranks = Ranks(0, 1, device)
        self.precision: Any = resolve_precision(options.precision, device)

    def weights(self, run: Pretraining) -> Path:
        """The encoder that a pre-training leaves."""
        return self.out / "weights" / run.name / "encoder.safetensors"

    def pretrain(self, run: Pretraining) -> dict[str, float]:
        """Pre-train, keep the encoder; returns the last loss, and the images per second."""
        options, settings = self.options, self._settings(run)
        pipeline = open_images(settings, self.ranks, batch_size=options.batch)
        torch.manual_seed(run.seed)
        with _running(pipeline) as interrupt:
            training = PretrainRun(settings, self.ranks, pipeline, self._model(run))
            begun = clock(self.ranks.device)
            finished = training.trainer(None, None, Watchdog(TIMEOUT), interrupt).train()
            seconds = clock(self.ranks.device) - begun
        if not finished:
            raise KeyboardInterrupt
        folder = self.weights(run).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_encoder(encoder_state_dict(training.model, settings.network), settings.network, folder)
        return {"loss": training.position.loss, "images_per_second": training.position.step * options.batch / seconds}

    def finetune(self, run: Finetuning) -> dict[str, float]:
        """Fine-tune, and judge once, at the end; returns top-1 in percent."""
        settings = self._finetune_settings(run)
        weights = read_weights(self.weights(run.before)) if run.before else None
        torch.manual_seed(run.seed)
        train = open_train(settings, self.ranks, View(scale=(settings.recipe.min_scale, 1.0)))
        watched = open_val(settings, self.ranks, train, lambda step: None)
        settings.data.val_path = str(self.images.held_out() if run.held_out else self.images.test)
        judged = open_val(settings, self.ranks, train, lambda step: None)
        drop_path = settings.recipe.drop_path or 0.0
        model = build_classifier(settings.network, STAGES, weights, train.num_classes, drop_path, settings.size)
        with _running(train, watched, judged) as interrupt:
            tuning = FinetuneRun(settings, self.ranks, train, watched, model)
            if not tuning.trainer(None, Report(None), Watchdog(TIMEOUT), interrupt).train():
                raise KeyboardInterrupt
            classify = partial(self._classify, tuning.network.eval())
            return judge(classify, judged, self.ranks).accuracy()

    def seconds_per_step(self, runs: list[Pretraining], repeats: int) -> dict[int, float]:
        """Median seconds of a step at each run's decoder width, in turns."""
        device, way = self.ranks.device, Way(precision=self.precision)
        steps: dict[str, Callable[[], tuple[float, ...]]] = {}
        for run in runs:
            model, shape = self._model(run), Shape(run.network, SIZE, run.mask, self.options.batch, run.width)
            model.encoder.context.kernels = None
            steps[str(run.width)] = partial(
                _timed, train_step(way, model, device), *inputs(model, shape, way, device), device
            )
        return {int(width): seconds for width, (seconds,) in medians(steps, repeats).items()}

    def _model(self, run: Pretraining) -> SparK:
        return build(run).to(self.ranks.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def _settings(self, run: Pretraining) -> training.Settings:
        options = self.options
        return training.Settings(
            training.Data(
                str(self.images.some(run.images)),
                input_size=str(SIZE),
                batch_size=options.batch,
                workers=options.workers,
            ),
            training.Model(model=_own(run.network), stages=STAGES, mask_ratio=run.mask, decoder_width=run.width),
            training.Optim(run.epochs, WARMUP * run.epochs, options.base_lr, options.optimizer),  # type: ignore[arg-type]
            training.Run("learning", seed=run.seed, precision=self.precision, picture_every=0),
        )

    def _finetune_settings(self, run: Finetuning) -> Any:
        options = self.options
        learned = self.images.labelled(run.share, run.seed, run.held_out)
        batch = min(options.tune_batch, max(1, round(run.share * len(self.images)) // 4))
        return evaluation.Finetune(
            evaluation.Data(
                str(learned), str(self.images.watched()), input_size=str(SIZE), batch_size=batch, crop_pct=1.0,
                workers=options.workers,
            ),
            evaluation.Model("none", _own(run.network), STAGES),
            evaluation.FinetuneRunSettings("learning", seed=run.seed, precision=self.precision),
            Recipe(
                epochs=run.epochs, warmup_epochs=WARMUP * run.epochs,  # type: ignore[arg-type]
                base_lr=run.lr * 256 / batch, optimizer="adamw", loss="ce", layer_decay=1.0, weight_decay=0.05,
                mixup=0.0, cutmix=0.0, smoothing=0.1, repeats=1, augment="none", erase=0.0,
                min_scale=options.min_scale, drop_path=0.0, ema=0.0, clip=1.0,
            ),
        ).resolved(_own(run.network), STAGES)  # fmt: skip

    def _classify(self, network: Any, images: Tensor) -> Tensor:
        dtype = DTYPES[self.precision]
        with torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32):
            return network(images)


def build(run: Pretraining) -> SparK:
    """SparK with the one thing changed that the variant says."""
    encoder, method = VARIANTS[run.variant]
    packed = encoder(build_network(_own(run.network)), (SIZE, SIZE), STAGES, keep=1 - run.mask)
    return method(packed, (SIZE, SIZE), run.mask, run.width)


def _own(network: str) -> str:
    return f"learning_networks:{network}"


def _timed(step: Any, images: Tensor, visible: Tensor, device: torch.device) -> tuple[float]:
    begun = clock(device)
    step(0, images, visible)
    return (clock(device) - begun,)


@contextmanager
def _running(*opened: Pipeline | Labelled) -> Iterator[Interrupt]:
    interrupt = Interrupt()
    try:
        yield interrupt
    finally:
        interrupt.release()
        for each in opened:
            each.close()
