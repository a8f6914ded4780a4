"""The loop of a run: where it is, what happens after every step and every epoch, how it is left and resumed."""

from __future__ import annotations

import logging
import math
import signal
from contextlib import closing
from itertools import count as count_from
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines import Pipeline
from spark_fast.export import save_encoder
from spark_fast.masking import sample_visible
from spark_fast.spark import SparK
from spark_fast.training import checkpoint
from spark_fast.training.boards import open_boards
from spark_fast.training.cost import count
from spark_fast.training.device import Gauge, matmul_rate
from spark_fast.training.distributed import Ranks
from spark_fast.training.journal import Journal, Meter
from spark_fast.training.optim import build_optimizer
from spark_fast.training.pictures import reconstruction_grid, save_png
from spark_fast.training.profiling import Profile
from spark_fast.training.resume import check_same_run
from spark_fast.training.run_folder import CHECKPOINT
from spark_fast.training.settings import Settings, SettingsError
from spark_fast.training.spikes import Spikes
from spark_fast.training.step import Schedule, TrainStep, resolve_precision

log = logging.getLogger("spark_fast")

INTERRUPTED = 75  # exit code: stopped before the end, everything is saved


class NotFiniteError(Exception):
    """The loss or the gradient is no number any more."""


class Interrupt:
    """Remembers a first SIGINT or SIGTERM, so that the step in flight is finished; a second one is not caught."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def _remember(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])

    def release(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class PretrainRun:
    """A run in progress: its parts, and the one number that says where it is, the step."""

    def __init__(self, settings: Settings, ranks: Ranks, pipeline: Pipeline, model: SparK) -> None:
        self.settings, self.ranks, self.pipeline, self.model = settings, ranks, pipeline, model
        self.folder: Path | None = None
        self.pictured: Tensor | None = None
        self.step, self.begun, self.loss = 0, 0, float("nan")
        self.steps_per_epoch = len(pipeline)
        self.total_steps = settings.optim.epochs * self.steps_per_epoch
        local = settings.data.batch_size // ranks.world_size
        if local % settings.optim.accumulate:
            raise SettingsError(
                f"--accumulate {settings.optim.accumulate} does not divide the {local} images of a rank's batch"
            )
        self.positions = torch.arange(local, device=ranks.device) + ranks.rank * local
        self.optimizer = build_optimizer(settings.optim.optimizer, model, settings.beta2)
        self.advance = self._train_step()
        self.spikes, self.profile = Spikes(), Profile(None, ranks.device, 0)
        rate = matmul_rate(ranks.device, self.advance.dtype)  # on every rank, as they all compute at a time
        self.gauge = Gauge(count(model), rate, ranks.device, ranks.world_size)
        self.interrupt = Interrupt()

    def restore(self, path: Path) -> None:
        """Go on where a checkpoint was written, at the very next batch."""
        state = checkpoint.read_run(path)
        check_same_run(path, state, self.settings, self.pipeline.num_samples)
        checkpoint.restore(path, state, self.model, self.optimizer)
        self.advance.scaler.load_state_dict(state["scaler"])
        self.step = self.begun = state["step"]
        self.loss = state["loss"]
        log.info("resumed from %s at step %d of %d", path, self.step, self.total_steps)

    def train(self, folder: Path | None, pictured: Tensor | None) -> int:
        """Train to the last epoch.

        Args:
            folder: the run folder, None on ranks that do not write.
            pictured: images (N, 3, H, W) for the reconstruction pictures, None for no pictures.

        Returns:
            0, or 75 when interrupted (the checkpoint is then written).

        Raises:
            NotFiniteError: loss or gradient are no numbers any more; the last checkpoint is kept.
        """
        self.folder, self.pictured = folder, pictured
        journal = Journal(
            self.folder,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.settings.optim.epochs,
            step=self.step,
            boards=open_boards(self.folder, self.settings, self.step),
        )
        self.profile = Profile(self.folder if self.settings.run.profile else None, self.ranks.device, self.step)
        try:
            while self.step < self.total_steps:
                leaving = self._train_epoch(journal)
                if self.step % self.steps_per_epoch == 0:
                    self._end_of_epoch(journal)
                if leaving and self.step < self.total_steps:
                    return self._leave()
        finally:
            self.profile.close()
            journal.close()
            self.interrupt.release()
        if self.folder is not None:
            self._save_weights()  # also when a finished run is resumed
            print(f"done: {self.step} steps, loss {self.loss:.4f}; everything is in {self.folder}/", flush=True)
        return 0

    def _train_step(self) -> TrainStep:
        settings, optim = self.settings, self.settings.optim
        schedule = Schedule(
            settings.peak_lr,
            optim.warmup_epochs * self.steps_per_epoch,
            self.total_steps,
            optim.weight_decay,
            optim.weight_decay_end or optim.weight_decay,
        )
        return TrainStep(
            self._wrapped_model(),
            self.optimizer,
            schedule,
            precision=resolve_precision(settings.run.precision, self.ranks.device),
            device=self.ranks.device,
            clip=optim.clip,
            accumulate=optim.accumulate,
        )

    def _wrapped_model(self) -> nn.Module:
        """The model for data parallelism, compiled if asked."""
        model: nn.Module = self.model.train()
        if self.ranks.world_size > 1:
            on_gpu = self.ranks.device.type == "cuda"
            model = DistributedDataParallel(
                model,
                device_ids=[self.ranks.device] if on_gpu else None,
                broadcast_buffers=False,  # as published: statistics are synchronised or each rank's own
                gradient_as_bucket_view=True,
            )
        return torch.compile(model) if self.settings.run.compile else model  # type: ignore[return-value]

    def _train_epoch(self, journal: Journal) -> bool:
        """The steps of this epoch that are still to do; True when the run is to be left."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        run, meter = self.settings.run, Meter()
        with closing(self.pipeline.epoch(epoch, done)) as batches:  # closing stops what is being decoded ahead
            for batch in meter.timed(batches):
                loss, norm = self._one_step(batch.images)
                meter.add(loss, norm)
                self.spikes.add(loss, batch.ids)
                self.step += 1
                journal.advance(self.step)
                self.profile.advance()
                limit = 0 < run.max_steps <= self.step - self.begun
                leaving = self.ranks.any(self.interrupt.asked or limit)
                last = self.step % self.steps_per_epoch == 0
                saving = run.save_every > 0 and self.step % run.save_every == 0
                if last or leaving or saving or self.step % run.log_every == 0:
                    self._log(meter, journal)
                if (saving or leaving) and not last:
                    self._save()
                if leaving or last:
                    break
        return leaving

    def _one_step(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and advance. Whatever is random in a step depends on (seed, step, rank) alone."""
        seed = self.settings.run.seed
        torch.manual_seed(hash((seed, self.step, self.ranks.rank)) & (2**63 - 1))
        visible = sample_visible(seed, self.step, self.positions, self.model.grid, self.model.num_visible)
        return self.advance(self.step, images, visible)[:2]

    def _log(self, meter: Meter, journal: Journal) -> None:
        means = meter.read(self.settings.data.batch_size, self.ranks.mean)
        self.loss = means["loss"]
        # in fp16 a gradient overflows now and then; the scaler skips that step and lowers its scale
        overflow = self.advance.scaler.is_enabled()
        if not math.isfinite(means["loss"]) or not (overflow or math.isfinite(means["grad_norm"])):
            raise NotFiniteError(
                f"the loss is {means['loss']} and the gradient's norm {means['grad_norm']} at step {self.step}; "
                f"the last checkpoint is kept: resume from it with a lower --base_lr"
            )
        self.spikes.report(self.step, self.ranks.mean)
        journal.point(self.step, means | self._spent(means), *self.advance.schedule.at(self.step - 1))

    def _spent(self, means: dict[str, float]) -> dict[str, float]:
        """Where a step's seconds went, and what was made of the device, since the last log point."""
        phases = {"data": means["data_wait"] * means["seconds"], **self.advance.clock.read(), "step": means["seconds"]}
        seconds = {f"{name}_seconds": value / means["steps"] for name, value in phases.items()}
        return seconds | self.gauge.read(means["images_per_second"])

    def rehearse(self, steps: int) -> dict[str, float]:
        """Take a few steps and write nothing; returns the figures of the last one alone."""
        self.interrupt.release()  # there is nothing to save
        meter = Meter()
        batches = (b for epoch in count_from(self.step // self.steps_per_epoch) for b in self.pipeline.epoch(epoch))
        with closing(batches):
            for batch in islice(meter.timed(batches), steps):
                self.advance.clock.read()
                meter.add(*self._one_step(batch.images))
                means = meter.read(self.settings.data.batch_size, self.ranks.mean)
                self.step += 1
        return means | self._spent(means)

    def _end_of_epoch(self, journal: Journal) -> None:
        problems = self.pipeline.problems
        journal.epoch(self.step, {"converted": problems.converted, "replaced": problems.replaced})
        self._save()
        self._save_weights()
        every = self.settings.run.picture_every
        epoch = self.step // self.steps_per_epoch
        if self.folder is not None and self.pictured is not None and epoch % every == 0:
            grid = reconstruction_grid(self.model, self.pictured, self.settings.run.seed)
            save_png(grid, self.folder / "reconstruction" / f"epoch_{epoch:04d}.png")
            journal.picture(grid, self.step)

    def _save(self) -> None:
        if self.folder is None:
            return
        checkpoint.save(
            self.folder / CHECKPOINT,
            self.model,
            self.optimizer,
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            loss=self.loss,
            num_samples=self.pipeline.num_samples,
            settings=self.settings.to_dict(),
            random_state=checkpoint.random_state(),
            scaler=self.advance.scaler.state_dict(),
        )

    def _save_weights(self) -> None:
        if self.folder is not None:
            save_encoder(self.model, self.settings.network, self.folder)

    def _leave(self) -> int:
        if self.folder is not None:
            print(
                f"stopped at step {self.step} of {self.total_steps}; saved {self.folder / CHECKPOINT}. "
                f"Go on with the same command and --resume auto",
                flush=True,
            )
        return INTERRUPTED
