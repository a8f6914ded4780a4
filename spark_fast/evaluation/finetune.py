"""Fine-tuning: the loop around `TrainStep`, judged after every epoch, saved and resumed as pre-training is.

Whatever is random in a step depends on (seed, step, rank) alone, so a run that was interrupted ends with the bits of
one that was not (fp32 on a CPU).
"""

from __future__ import annotations

import logging
import random
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spark_fast.checkpoint import file as checkpoint
from spark_fast.checkpoint.async_writer import AsyncWriter
from spark_fast.checkpoint.manager import CHECKPOINT, CheckpointManager
from spark_fast.checkpoint.state_dict import load_strictly
from spark_fast.errors import INTERRUPTED, CheckpointError, SettingsError
from spark_fast.evaluation.accuracy import Scores, judge
from spark_fast.evaluation.data import Labelled
from spark_fast.evaluation.eval_settings import Finetune
from spark_fast.evaluation.layer_decay import parameter_groups
from spark_fast.evaluation.mixup import Augment, Mix
from spark_fast.evaluation.report import Report
from spark_fast.pipelines import Pipeline
from spark_fast.reporting.run_logger import Meter
from spark_fast.run.cpu_sync_batchnorm import HostSyncBatchNorm
from spark_fast.run.data_parallel import data_parallel, share_statistics
from spark_fast.run.distributed import Ranks
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.lamb import Lamb
from spark_fast.training.nonfinite import NonfiniteReport
from spark_fast.training.resume import differing, refuse_differences
from spark_fast.training.step import DTYPES, Schedule, TrainStep, resolve_precision
from spark_fast.versions import versions
from spark_fast.weights.timm_keys import write_encoder

log = logging.getLogger("spark_fast")


class Objective(nn.Module):
    """(images, targets) -> loss, what `TrainStep` calls."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss in fp32 of (B, 3, H, W) against (B, classes)."""
        return self.criterion(self.network(images).float(), targets)


class FinetuneRun:
    """A run in progress: its parts, and the one number that says where it is, the step.

    Args:
        settings: resolved.
        network: (B, 3, H, W) -> (B, classes).
    """

    def __init__(
        self, settings: Finetune, ranks: Ranks, train: Pipeline, val: Labelled, network: nn.Module, watchdog: Watchdog
    ) -> None:
        self.settings, self.ranks, self.train_images, self.val, self.watchdog = settings, ranks, train, val, watchdog
        self.network = self._on_device(network).train()
        self.recipe: Any = cast(Any, settings.recipe)  # resolved: nothing in it is None
        self.steps_per_epoch = len(train)
        self.total_steps = self.recipe.epochs * self.steps_per_epoch
        self.step = self.begun = 0
        self.loss, self.best = float("nan"), {}  # type: float, dict[str, Any]
        self.ema = ModelEmaV3(self.network, decay=self.recipe.ema) if self.recipe.ema else None
        self.augment, self.mix = Augment(self.recipe, ranks.device), Mix(self.recipe, val.num_classes)
        self._check_batch(settings.batch_size // ranks.world_size)
        self.optimizer = self._optimizer()
        precision = resolve_precision(settings.run.precision, ranks.device)
        self.dtype = DTYPES[precision]
        peak = self.recipe.base_lr * settings.batch_size / 256
        warmup, decay = self.recipe.warmup_epochs * self.steps_per_epoch, self.recipe.weight_decay
        criterion = BinaryCrossEntropy(smoothing=0) if self.recipe.loss == "bce" else SoftTargetCrossEntropy()
        static = self.recipe.accumulate == 1
        self.advance = TrainStep(
            data_parallel(Objective(self.network, criterion), ranks, static=static, gradients_in_bf16=False),
            self.optimizer,
            Schedule(peak, warmup, self.total_steps, decay, decay),
            precision=precision,
            device=ranks.device,
            clip=self.recipe.clip,
            accumulate=self.recipe.accumulate,
            agree=ranks.max,
        )
        self.bad_steps = NonfiniteReport(self.advance.guard, ranks, settings.run.max_bad_steps)
        self.saver = AsyncWriter(0, 0.0, begun=0)
        self.interrupt = Interrupt()

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint."""
        moments = 1 if self.recipe.optimizer == "sgd" else 2
        copies = 1 + (self.ema is not None)
        return copies * checkpoint.tensor_bytes(self.network.state_dict()) + moments * sum(
            p.nbytes for p in self.network.parameters()
        )

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Go on where this checkpoint was written.

        Raises:
            CheckpointError: it is of another run.
        """
        differences = differing(state["settings"], self.settings.meaning(), self.settings.HARMLESS)
        refuse_differences(path, state, differences, self.train_images, "another <name> to begin a new run")
        checkpoint.restore(path, state, self.network, self.optimizer)
        if self.ema is not None:
            load_strictly(self.ema.module, state["ema"])
        self.advance.scaler.load_state_dict(state["scaler"])
        self.step = self.begun = state["step"]
        self.loss, self.best = state["loss"], state["best"]
        if len(set(self.ranks.gather(self.step))) > 1:
            raise CheckpointError(f"{path}: the ranks do not read the same checkpoint; see their messages")
        log.info("resumed from %s at step %d of %d", path, self.step, self.total_steps)

    def train(self, store: CheckpointManager | None) -> int:
        """Train to the last epoch; `store` is the run folder's, None on ranks that do not write.

        Returns:
            0, or 75 when interrupted (the checkpoint is then written).

        Raises:
            NotFiniteError: loss or gradient are no numbers any more.
            CheckpointError: the last checkpoint could not be written, twice.
        """
        report = Report(store.folder if store else None, self.step)
        try:
            while self.step < self.total_steps:
                leaving = self._epoch(report)
                if self.step % self.steps_per_epoch == 0:
                    self._judge(report, store)
                self._save(store)
                if leaving and self.step < self.total_steps:
                    return self._leave(store)
            self.saver.finish()
            self._result(report)
        finally:
            self.saver.wait()
            report.close()
        return 0

    def _on_device(self, network: nn.Module) -> nn.Module:
        if self.settings.run.sync_batchnorm and self.ranks.world_size > 1:
            if self.ranks.device.type == "cuda":
                network = convert_sync_batchnorm(network)
            else:
                HostSyncBatchNorm.replace_in(network)
        return network.to(self.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _check_batch(self, share: int) -> None:
        if share % self.recipe.accumulate:
            raise SettingsError(
                f"--accumulate {self.recipe.accumulate} does not divide the {share} images of a rank's batch"
            )
        if self.mix.mixes and share % 2:
            raise SettingsError(
                f"mixup and cutmix mix pairs, but a rank's batch has {share} images: take another --batch_size, or "
                f"--mixup 0 --cutmix 0"
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.network, self.recipe.layer_decay)
        if self.recipe.optimizer == "lamb":  # as published (downstream_imagenet/util.py)
            return Lamb(groups, always_adapt=True, bias_correction=False)
        return create_optimizer_v2(groups, opt=self.recipe.optimizer, lr=0.0, weight_decay=0.0, fused=True)

    def _epoch(self, report: Report) -> bool:
        """The steps of this epoch that are still to do; True when the run is to be left."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        run, meter, leaving = self.settings.run, Meter(), False
        with closing(self.train_images.epoch(epoch, done)) as batches:
            for batch in meter.timed(batches):
                self.watchdog.at(self.step, "in the step")
                assert batch.labels is not None
                self._seed()
                images, targets = self.mix(self.augment(batch.images), batch.labels)
                meter.add(*self.advance(self.step, images, targets))
                if self.ema is not None:
                    self.ema.update(self.network)
                self.bad_steps.add(batch.ids)
                self.step += 1
                limit = 0 < run.max_steps <= self.step - self.begun
                leaving = self.ranks.any(self.interrupt.asked or limit)
                last = self.step % self.steps_per_epoch == 0
                if last or leaving or self.step % run.log_every == 0:
                    self.bad_steps.report(self.step, report.folder)
                    self._log(meter, report, epoch)
                self.watchdog.at(self.step, "waiting for data")
                if leaving or last:
                    break
        self.advance.clock.read()
        return leaving

    def _seed(self) -> None:
        seed = hash((self.settings.run.seed, self.step, self.ranks.rank)) & (2**32 - 1)
        torch.manual_seed(seed)
        random.seed(seed)  # RandomErasing draws from it,
        np.random.seed(seed)  # noqa: NPY002 and Mixup from this

    def _log(self, meter: Meter, report: Report, epoch: int) -> None:
        means = meter.read(self.settings.batch_size, self.ranks.mean)
        self.loss = means["loss"]
        rate = self.advance.schedule.at(self.step - 1)[0]
        row = {key: means[key] for key in ("loss", "grad_norm", "images_per_second", "data_wait", "skipped")}
        text = f"epoch {epoch + 1}/{self.recipe.epochs}  step {self.step}/{self.total_steps}  loss {self.loss:.4f}"
        report.point(self.step, f"{text}  {row['images_per_second']:.1f} images/s", epoch=epoch + 1, lr=rate, **row)

    def _judge(self, report: Report, store: CheckpointManager | None) -> None:
        """Accuracy of the weights and of their average; the best of all is written as a file for timm."""
        if not self.settings.run.sync_batchnorm:
            share_statistics(self.network, self.ranks)
        epoch = self.step // self.steps_per_epoch
        row: dict[str, float] = {}
        for kind, network in self._judged().items():
            scores = self._scores(network)
            found = scores.accuracy()
            row |= {f"{kind}_top1": found["top1"], f"{kind}_top5": found["top5"]}
            if found["top1"] > self.best.get("top1", -1.0):
                self.best = {**found, "epoch": epoch, "weights": kind, "confusion": scores.matrix}
                if store is not None:
                    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
                    write_encoder(state, self.settings.network, store.folder)
        self.best["last"] = row
        shown = ", ".join(f"{name} {value:.2f} %" for name, value in row.items() if name.endswith("top1"))
        text = f"epoch {epoch} done: {shown}; best {self.best['top1']:.2f} %"
        report.epoch(self.step, text, epoch=epoch, loss=self.loss, **row)

    def _judged(self) -> dict[str, nn.Module]:
        return {"raw": self.network} | ({"ema": self.ema.module} if self.ema is not None else {})

    def _scores(self, network: nn.Module) -> Scores:
        device = self.ranks.device.type

        def classify(images: Tensor) -> Tensor:
            with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
                return network(images)

        training = network.training
        network.eval()
        scores = judge(classify, self.val, self.ranks)
        network.train(training)
        return scores

    def _save(self, store: CheckpointManager | None) -> None:
        self.watchdog.at(self.step, "saving")
        if store is None:
            return
        self.saver.begin(self.step)
        step, content = self.step, checkpoint.run_state(
            self.network,
            self.optimizer,
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            loss=self.loss,
            num_samples=self.train_images.num_samples,
            listing=self.train_images.listing,
            settings=self.settings.meaning(),
            versions=versions(),
            random_state=checkpoint.random_state(),
            scaler=self.advance.scaler.state_dict(),
            ema=self.ema.module.state_dict() if self.ema is not None else {},
            best=self.best,
        )  # fmt: skip

        def write() -> None:
            store.write(step, content)

        self.saver.submit(write)

    def _leave(self, store: CheckpointManager | None) -> int:
        self.saver.finish()
        if store is not None:
            print(f"stopped at step {self.step} of {self.total_steps}; saved {store.folder / CHECKPOINT}. "
                  f"Go on with the same command and --resume auto", flush=True)  # fmt: skip
        return INTERRUPTED

    def _result(self, report: Report) -> None:
        best = {key: value for key, value in self.best.items() if key not in ("confusion", "last")}
        seen = {"train_images": self.train_images.num_samples, "replaced": self.val.pipeline.bad_images.substituted}
        report.result(
            self.best["confusion"],
            self.train_images.classes,
            mode="finetune",
            **best,
            last=self.best["last"],
            **seen,
            settings=self.settings.to_dict(),
        )
