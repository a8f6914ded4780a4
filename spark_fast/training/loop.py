"""The loop of a run: where it is, what happens after every step and every epoch, how it is left and resumed."""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import count as count_from
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from spark_fast.checkpoint import file as checkpoint
from spark_fast.checkpoint.async_writer import AsyncWriter
from spark_fast.checkpoint.manager import CHECKPOINT, CheckpointManager, read_newest
from spark_fast.errors import INTERRUPTED, CheckpointError, SettingsError
from spark_fast.masking import sample_visible
from spark_fast.pipelines import Pipeline
from spark_fast.reporting.flops import count
from spark_fast.reporting.loggers import open_loggers
from spark_fast.reporting.loss_spikes import Spikes
from spark_fast.reporting.mfu import MfuMeter, matmul_rate
from spark_fast.reporting.profiler import Profile
from spark_fast.reporting.reconstructions import reconstruction_grid, save_png
from spark_fast.reporting.run_logger import Meter, RunLogger
from spark_fast.run.data_parallel import data_parallel, gather_state
from spark_fast.run.distributed import Ranks
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.spark import SparK
from spark_fast.training.nonfinite import NonfiniteReport
from spark_fast.training.optim import build_optimizer
from spark_fast.training.resume import check_same_run
from spark_fast.training.settings import Settings
from spark_fast.training.step import Schedule, TrainStep, compiled, resolve_precision
from spark_fast.versions import versions
from spark_fast.weights.timm_keys import encoder_names, renamed, write_encoder

log = logging.getLogger("spark_fast")


class PretrainRun:
    """A run in progress: its parts, and the one number that says where it is, the step."""

    def __init__(self, settings: Settings, ranks: Ranks, pipeline: Pipeline, model: SparK, watchdog: Watchdog) -> None:
        self.settings, self.ranks, self.pipeline, self.model = settings, ranks, pipeline, model
        self.watchdog = watchdog
        self.store: CheckpointManager | None = None
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
        zero = settings.optim.zero and ranks.world_size > 1
        self.optimizer = build_optimizer(settings.optim.optimizer, model, settings.beta2, zero=zero)
        self.advance = self._train_step()
        self.bad_steps = NonfiniteReport(self.advance.guard, ranks, settings.optim.max_bad_steps)
        self.spikes, self.profile = Spikes(), Profile(None, ranks.device, 0)
        rate = matmul_rate(ranks.device, self.advance.dtype)  # on every rank, as they all compute at a time
        self.gauge = MfuMeter(count(model), rate, ranks.device, ranks.world_size)
        self.interrupt = Interrupt()

    @property
    def folder(self) -> Path | None:
        """The run folder, None on ranks that do not write."""
        return None if self.store is None else self.store.folder

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: the model, and what the optimiser keeps for each parameter."""
        moments = {"lamb": 2, "adamw": 2, "sgd": 1}[self.settings.optim.optimizer]
        state = checkpoint.tensor_bytes(self.model.state_dict())
        return state + moments * sum(p.nbytes for p in self.advance.parameters)

    def restore(self, paths: list[Path]) -> None:
        """Go on where the first of these checkpoints that can be read was written, at the very next batch."""
        path, state = read_newest(paths)
        check_same_run(path, state, self.settings, self.pipeline)
        checkpoint.restore(path, state, self.model, self.optimizer)
        self.advance.scaler.load_state_dict(state["scaler"])
        self.step = self.begun = state["step"]
        self.loss = state["loss"]
        if len(set(self.ranks.gather(self.step))) > 1:
            raise CheckpointError(f"{path}: the ranks do not read the same checkpoint; see their messages")
        log.info("resumed from %s at step %d of %d", path, self.step, self.total_steps)

    def train(self, store: CheckpointManager | None, pictured: Tensor | None) -> int:
        """Train to the last epoch.

        Args:
            store: of the run folder, None on ranks that do not write.
            pictured: images (N, 3, H, W) for the reconstruction pictures, None for no pictures.

        Returns:
            0, or 75 when interrupted (the checkpoint is then written).

        Raises:
            NotFiniteError: loss or gradient are no numbers any more; weights and last checkpoint are good.
            CheckpointError: the last checkpoint could not be written, twice.
        """
        self.store, self.pictured = store, pictured
        # not by the saver's thread: networks are built for it on the meta device, for torch.compile the whole process's
        self.names = encoder_names(self.model, self.settings.network) if store else {}
        self.saver = AsyncWriter(*self.settings.save_every, begun=self.step)
        journal = RunLogger(
            self.folder,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.settings.optim.epochs,
            step=self.step,
            boards=open_loggers(self.folder, self.settings, self.step),
        )
        self.profile = Profile(self.folder if self.settings.run.profile else None, self.ranks.device, self.step)
        try:
            while self.step < self.total_steps:
                leaving = self._train_epoch(journal)
                if self.step % self.steps_per_epoch == 0:
                    self._end_of_epoch(journal)
                if leaving and self.step < self.total_steps:
                    return self._leave()
            self.saver.finish()
        finally:
            self.profile.close()
            self.saver.wait()  # whatever the reason for leaving, a write in flight is finished
            journal.close()
        if self.folder is not None:
            state = renamed(self.model.state_dict(), self.names)
            write_encoder(state, self.settings.network, self.folder)  # also when a finished run is resumed
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
        model = self._wrapped_model()
        try:
            return TrainStep(
                model,
                self.optimizer,
                schedule,
                precision=resolve_precision(settings.run.precision, self.ranks.device),
                device=self.ranks.device,
                clip=optim.clip,
                accumulate=optim.accumulate,
                agree=self.ranks.max,
                cuda_graph=settings.run.cuda_graph,
            )
        except ValueError as error:
            raise SettingsError(f"--cuda_graph: {error}") from error

    def _wrapped_model(self) -> nn.Module:
        """The model for data parallelism, compiled if asked."""
        optim = self.settings.optim
        model = data_parallel(
            self.model.train(),
            self.ranks,
            static=optim.accumulate == 1,
            gradients_in_bf16=optim.allreduce == "bf16",
        )
        return compiled(model, self.settings.run.compile)

    def _train_epoch(self, journal: RunLogger) -> bool:
        """The steps of this epoch that are still to do; True when the run is to be left."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        run, meter = self.settings.run, Meter()
        with closing(self.pipeline.epoch(epoch, done)) as batches:  # closing stops what is being decoded ahead
            for batch in meter.timed(batches):
                self.watchdog.at(self.step, "in the step")
                loss, norm = self._one_step(batch.images)
                meter.add(loss, norm)
                self.spikes.add(loss, batch.ids)
                self.bad_steps.add(batch.ids)
                self.step += 1
                journal.advance(self.step)
                self.profile.advance()
                limit = 0 < run.max_steps <= self.step - self.begun
                leaving = self.ranks.any(self.interrupt.asked or limit)
                last = self.step % self.steps_per_epoch == 0
                every = self.settings.save_every[0]
                log_point = last or leaving or (every and self.step % every == 0) or self.step % run.log_every == 0
                if log_point or self.ranks.device.type == "cpu":  # there it costs nothing to look
                    self.bad_steps.report(self.step, self.folder)
                if log_point:
                    self._log(meter, journal)  # on all ranks together, and before a save: nothing broken is kept
                    due = self.ranks.any(self.store is not None and self.saver.due(self.step))
                    if not last and (leaving or (due and not self.bad_steps.in_a_row)):
                        self._save()
                self.watchdog.at(self.step, "waiting for data")
                if leaving or last:
                    break
        return leaving

    def _one_step(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and advance. Whatever is random in a step depends on (seed, step, rank) alone."""
        seed = self.settings.run.seed
        torch.manual_seed(hash((seed, self.step, self.ranks.rank)) & (2**63 - 1))
        visible = sample_visible(seed, self.step, self.positions, self.model.grid, self.model.num_visible)
        return self.advance(self.step, images, visible)

    def _log(self, meter: Meter, journal: RunLogger) -> None:
        means = meter.read(self.settings.data.batch_size, self.ranks.mean)
        if means["skipped"] < means["steps"]:
            self.loss = means["loss"]
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

    def _end_of_epoch(self, journal: RunLogger) -> None:
        counts = self.pipeline.bad_images
        journal.epoch(self.step, {"converted": counts.converted, "replaced": counts.substituted})
        self._save(encoder=True)
        every = self.settings.run.picture_every
        epoch = self.step // self.steps_per_epoch
        if self.folder is not None and self.pictured is not None and epoch % every == 0:
            grid = reconstruction_grid(self.model, self.pictured, self.settings.run.seed)
            save_png(grid, self.folder / "reconstruction" / f"epoch_{epoch:04d}.png")
            journal.picture(grid, self.step)

    def _save(self, encoder: bool = False) -> None:
        """Copy the state to the host, and have the checkpoint (and the encoder's weights) written from there."""
        self.watchdog.at(self.step, "saving")
        gather_state(self.optimizer)
        if self.store is None:
            return
        self.saver.begin(self.step)
        store, step, folder, network = self.store, self.step, self.store.folder, self.settings.network
        content = checkpoint.run_state(
            self.model,
            self.optimizer,
            step=step,
            epoch=step // self.steps_per_epoch,
            loss=self.loss,
            num_samples=self.pipeline.num_samples,
            listing=self.pipeline.listing,
            settings=self.settings.to_dict(),
            versions=versions(),
            random_state=checkpoint.random_state(),
            scaler=self.advance.scaler.state_dict(),
        )

        def write() -> None:
            store.write(step, content)
            if encoder:
                write_encoder(renamed(content["model"], self.names), network, folder)

        self.saver.submit(write)

    def _leave(self) -> int:
        self.saver.finish()
        if self.folder is not None:
            print(
                f"stopped at step {self.step} of {self.total_steps}; saved {self.folder / CHECKPOINT}. "
                f"Go on with the same command and --resume auto",
                flush=True,
            )
        return INTERRUPTED
