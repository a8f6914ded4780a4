"""Fine-tuning: the loop around `TrainStep`, judged after every epoch, saved and resumed as pre-training is.

Whatever is random in a step depends on (seed, step, rank) alone, so a run that was interrupted ends with the bits of
one that was not (fp32 on a CPU).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spark_fast.checkpoint.file import Content, RunContent
from spark_fast.checkpoint.manager import CheckpointManager
from spark_fast.checkpoint.state_dict import load_strictly
from spark_fast.encoder.layers.synced_batch_norm import sync_batch_norms
from spark_fast.errors import SettingsError
from spark_fast.evaluation.accuracy import Confusion, Scores, judge
from spark_fast.evaluation.data import Labelled
from spark_fast.evaluation.eval_settings import Finetune
from spark_fast.evaluation.layer_decay import parameter_groups
from spark_fast.evaluation.mixup import Augment, Mix
from spark_fast.evaluation.report import Report
from spark_fast.evaluation_mode import evaluation_mode
from spark_fast.pipelines import Batch, Pipeline
from spark_fast.reporting.monitor import Monitor
from spark_fast.reporting.run_summary import long_warmup
from spark_fast.run.data_parallel import data_parallel, share_statistics
from spark_fast.run.distributed import Ranks
from spark_fast.run.seeding import step_seed
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.checkpointer import Checkpointer
from spark_fast.training.nonfinite import NonfiniteReport
from spark_fast.training.optimizers.lamb import Lamb
from spark_fast.training.resume import differing, refuse_differences
from spark_fast.training.run_state import Position, RunState
from spark_fast.training.schedule import Schedule
from spark_fast.training.step import TrainStep, resolve_precision
from spark_fast.training.trainer import Trainer
from spark_fast.weights.timm_keys import write_encoder

log = logging.getLogger("spark_fast")


class Objective(nn.Module):
    """images (B, C, H, W), targets (B, classes) -> loss, a scalar: the model that `TrainStep` calls."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of the network's logits, (B, classes), in fp32."""
        return self.criterion(self.network(images).float(), targets)


class FinetuneStep:
    """step, batch -> loss and gradient norm: augments, mixes, advances.

    All random numbers of a step depend on seed, step and rank alone.
    """

    def __init__(
        self,
        advance: TrainStep,
        augment: Augment,
        mix: Mix,
        *,
        seed: int,
        rank: int,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.advance, self.augment, self.mix = advance, augment, mix
        self.seed, self.rank, self.after = seed, rank, after

    def __call__(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Advance by this rank's share of a global batch; returns loss and gradient norm, scalars on the device."""
        seed = step_seed(self.seed, step, self.rank)
        torch.manual_seed(seed)
        random.seed(seed)  # RandomErasing draws from it,
        np.random.seed(seed % 2**32)  # noqa: NPY002 and Mixup from this
        assert batch.labels is not None
        images, targets = self.mix(self.augment(batch.images), batch.labels)
        loss, norm = self.advance(step, images, targets)
        self.after()
        return loss, norm


class FinetuneRun:
    """The parts of a run, built from its settings: everything but the folder, which is opened last.

    Args:
        settings: resolved.
        network: (B, C, H, W) -> (B, classes).
    """

    def __init__(self, settings: Finetune, ranks: Ranks, train: Pipeline, val: Labelled, network: nn.Module) -> None:
        self.settings, self.ranks, self.train_images, self.val = settings, ranks, train, val
        self.recipe = settings.whole_recipe
        self.network = self._on_device(network).train()
        self.position = Position(len(train), self.recipe.epochs)
        self.best: Content = {}
        self.ema = ModelEmaV3(self.network, decay=self.recipe.ema) if self.recipe.ema else None
        mix = Mix(self.recipe, val.num_classes)
        self._check_batch(settings.batch_size // ranks.world_size, mix)
        self.optimizer = self._optimizer()
        self.advance = self._train_step()
        self.step = FinetuneStep(
            self.advance,
            Augment(self.recipe, ranks.device),
            mix,
            seed=settings.run.seed,
            rank=ranks.rank,
            after=self._average,
        )
        self.state = RunState(
            self.network, self.optimizer, self.advance.scaler, self.position, train, settings.meaning(), self._extra
        )

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint."""
        return self.state.size(1 if self.recipe.optimizer == "sgd" else 2, copies=1 + (self.ema is not None))

    def restore(self, path: Path, state: RunContent) -> None:
        """Go on where this checkpoint was written.

        Raises:
            CheckpointError: it is of another run.
        """
        older = {"in_chans": 3, "shuffle_block": 0}  # before there were such settings
        before = {**state["settings"], "data": {**older, **state["settings"]["data"]}}
        differences = differing(before, self.settings.meaning(), self.settings.HARMLESS)
        refuse_differences(path, state, differences, self.train_images, "another <name> to start a new run")
        self.state.restore(path, state, self.ranks)
        if self.ema is not None:
            load_strictly(self.ema.module, state["ema"])
        self.best = dict(state["best"])
        if "confusion" in self.best:  # as checkpoints had it before
            self.best["taken"] = Confusion.of_matrix(self.best.pop("confusion")).rows

    def trainer(
        self, manager: CheckpointManager | None, report: Report, watchdog: Watchdog, interrupt: Interrupt
    ) -> Trainer:
        """The loop of this run; `manager` and the report's folder are None on ranks that do not write."""
        run, ranks = self.settings.run, self.ranks
        return Trainer(
            self.step,
            self.train_images,
            Checkpointer(self.state, manager),
            monitor=Monitor(
                FinetuneLogger(report, self.position),
                images_per_step=self.settings.batch_size,
                clock=self.advance.clock,
                rates=self.advance.schedule.at,
                mean_over_ranks=ranks.mean,
            ),
            nonfinite=NonfiniteReport(self.advance.guard, ranks, run.max_bad_steps),
            end_of_epoch=partial(self._end_of_epoch, report),
            ranks=ranks,
            watchdog=watchdog,
            interrupt=interrupt,
            log_every=run.log_every,
            max_steps=run.max_steps,
            folder=report.folder,
        )

    def write_result(self, report: Report) -> None:
        """Write result.json: the best epoch, the last one, and how they came about."""
        best = {key: value for key, value in self.best.items() if key not in ("taken", "last")}
        seen = {"train_images": self.train_images.num_samples, "replaced": self.val.pipeline.bad_images.substituted}
        report.result(
            Confusion(self.val.num_classes, self.best["taken"]),
            self.train_images.classes,
            mode="finetune",
            **best,
            last=self.best["last"],
            **seen,
            settings=self.settings.to_dict(),
        )

    def _average(self) -> None:
        if self.ema is not None:
            self.ema.update(self.network)

    def _extra(self) -> Content:
        return {"ema": self.ema.module.state_dict() if self.ema is not None else {}, "best": self.best}

    def _on_device(self, network: nn.Module) -> nn.Module:
        if self.settings.run.sync_batchnorm and self.ranks.world_size > 1:
            if self.ranks.device.type == "cuda":
                network = convert_sync_batchnorm(network)
            else:
                sync_batch_norms(network)
        return network.to(self.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _check_batch(self, share: int, mix: Mix) -> None:
        if share % self.recipe.accumulate:
            raise SettingsError(
                f"--accumulate {self.recipe.accumulate} does not divide the {share} images of a rank's batch"
            )
        if mix.mixes and share % 2:
            raise SettingsError(
                f"mixup and cutmix mix pairs, but a rank's batch has {share} images: use another --batch_size, or "
                f"--mixup 0 --cutmix 0"
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.network, self.recipe.layer_decay)
        if self.recipe.optimizer == "lamb":  # as published (downstream_imagenet/util.py)
            return Lamb(groups, always_adapt=True, bias_correction=False)
        return create_optimizer_v2(groups, opt=self.recipe.optimizer, lr=0.0, weight_decay=0.0, fused=True)

    def _train_step(self) -> TrainStep:
        recipe, at = self.recipe, self.position
        criterion = BinaryCrossEntropy(smoothing=0) if recipe.loss == "bce" else SoftTargetCrossEntropy()
        objective = Objective(self.network, criterion)
        peak = recipe.base_lr * self.settings.batch_size / 256
        decay = recipe.weight_decay
        if doubt := long_warmup(recipe.warmup_epochs * at.steps_per_epoch, at.total_steps):
            log.warning(doubt)
        return TrainStep(
            data_parallel(objective, self.ranks, static=recipe.accumulate == 1, gradients_in_bf16=False),
            self.optimizer,
            Schedule(peak, recipe.warmup_epochs * at.steps_per_epoch, at.total_steps, decay, decay),
            precision=resolve_precision(self.settings.run.precision, self.ranks.device),
            device=self.ranks.device,
            clip=recipe.clip,
            accumulate=recipe.accumulate,
            agree=self.ranks.max,
        )

    def _end_of_epoch(self, report: Report, save: Callable[[], None]) -> None:
        """Accuracy of the weights and of their average; the best is written as a file for timm; then the save."""
        if not self.settings.run.sync_batchnorm:
            share_statistics(self.network, self.ranks)
        at = self.position
        row: dict[str, float] = {}
        networks = {"raw": self.network} | ({"ema": self.ema.module} if self.ema is not None else {})
        for kind, network in networks.items():
            scores = self._scores(network)
            found = scores.accuracy()
            row |= {f"{kind}_top1": found["top1"], f"{kind}_top5": found["top5"]}
            if found["top1"] > self.best.get("top1", -1.0):
                self.best = {**found, "epoch": at.epoch, "weights": kind, "taken": scores.confusion.rows}
                if report.folder is not None:
                    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
                    write_encoder(state, self.settings.network, report.folder)
        self.best["last"] = row
        shown = ", ".join(f"{name} {value:.2f} %" for name, value in row.items() if name.endswith("top1"))
        text = f"epoch {at.epoch} done: {shown}; best {self.best['top1']:.2f} %"
        report.epoch(at.step, text, epoch=at.epoch, loss=at.loss, **row)
        save()

    def _scores(self, network: nn.Module) -> Scores:
        device, dtype = self.ranks.device.type, self.advance.dtype

        def classify(images: Tensor) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return network(images)

        with evaluation_mode(network):
            return judge(classify, self.val, self.ranks)


class FinetuneLogger:
    """Log points as lines of the report (see `monitor.StepLogger`)."""

    def __init__(self, report: Report, position: Position) -> None:
        self.report, self.position = report, position

    def advance(self, step: int) -> None:
        """Nothing is shown of single steps."""

    def point(self, step: int, means: dict[str, float], lr: float, weight_decay: float) -> None:
        """A row of metrics, and a printed line."""
        at, epoch = self.position, (step - 1) // self.position.steps_per_epoch + 1
        row = {key: means[key] for key in ("loss", "grad_norm", "images_per_second", "data_wait", "skipped")}
        text = f"epoch {epoch}/{at.epochs}  step {step}/{at.total_steps}  loss {row['loss']:.4f}"
        self.report.point(step, f"{text}  {row['images_per_second']:.1f} images/s", epoch=epoch, lr=lr, **row)

    def close(self) -> None:
        """The report is closed by whoever opened it."""
