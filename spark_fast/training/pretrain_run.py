"""A pre-training run: its parts, built from the settings, and what only pre-training does in the loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from spark_fast.checkpoint.file import Content, RunContent, random_state
from spark_fast.checkpoint.manager import CheckpointManager, newest_readable
from spark_fast.errors import SettingsError
from spark_fast.method import Method
from spark_fast.pipelines import Batch, Pipeline
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.reporting.flops import count
from spark_fast.reporting.loggers import open_loggers
from spark_fast.reporting.loss_spikes import Spikes
from spark_fast.reporting.mfu import MfuMeter, matmul_rate
from spark_fast.reporting.monitor import Monitor
from spark_fast.reporting.profiler import Profile
from spark_fast.reporting.reconstructions import reconstruction_grid, save_png, titled
from spark_fast.reporting.run_logger import RunLogger
from spark_fast.reporting.run_summary import RunSummary
from spark_fast.run.data_parallel import data_parallel
from spark_fast.run.distributed import Ranks
from spark_fast.run.seeding import step_seed
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.checkpointer import Checkpointer
from spark_fast.training.nonfinite import NonfiniteReport
from spark_fast.training.online_evaluation import Evaluator, OnlineEvaluation, stoppable
from spark_fast.training.optimizers.optim import build_optimizer
from spark_fast.training.published_run import is_published, published_run, read_resumable
from spark_fast.training.resume import check_same_run, in_published_names
from spark_fast.training.run_state import Position, RunState
from spark_fast.training.schedule import Schedule
from spark_fast.training.settings import Settings
from spark_fast.training.step import DTYPES, TrainStep, compiled, resolve_precision
from spark_fast.training.trainer import Trainer
from spark_fast.weights.timm_keys import encoder_names, renamed, write_encoder

# settings, ranks, what the model computes in, what to call before each batch -> an evaluator
OpenEvaluator = Callable[[Settings, Ranks, torch.dtype, Callable[[int], None], Statistics | None], Evaluator]

TENSORS_KEPT = {"lamb": 2, "adamw": 2, "sgd": 1}  # by an optimiser for each parameter


class PretrainStep:
    """step, batch -> loss and gradient norm: draws the masks and advances.

    All random numbers of a step depend on seed, step and rank alone.
    """

    def __init__(self, model: Method, advance: TrainStep, seed: int, rank: int, share: int, masks: int = 1) -> None:
        self.model, self.advance, self.seed, self.rank, self.masks = model, advance, seed, rank, masks
        self.positions = torch.arange(share, device=advance.device) + rank * share  # in the global batch

    def __call__(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Advance by this rank's share of a global batch; returns loss and gradient norm, scalars on the device."""
        torch.manual_seed(step_seed(self.seed, step, self.rank))
        visible = self.model.sample_masks(self.seed, step, self.positions, self.masks)
        return self.advance(step, batch.images, visible)


class PretrainRun:
    """The parts of a run, built from its settings: everything but the folder, which is opened last."""

    def __init__(self, settings: Settings, ranks: Ranks, pipeline: Pipeline, model: Method) -> None:
        self.settings, self.ranks, self.pipeline, self.model = settings, ranks, pipeline, model
        optim, share = settings.optim, settings.data.batch_size // ranks.world_size
        if share % optim.accumulate:
            raise SettingsError(f"--accumulate {optim.accumulate} does not divide the {share} images of a rank's batch")
        values = share // optim.accumulate * settings.model.masks_per_image * model.num_visible
        synced = settings.run.sync_batchnorm and ranks.world_size > 1
        if values == 1 and not synced and any(isinstance(m, BatchNorm) for m in model.encoder.modules()):
            raise SettingsError(
                "one visible patch of one image is too little for a batch norm: use a larger --bs, or a smaller --mask"
            )
        self.position = Position(len(pipeline), optim.epochs)
        self.evaluator: Evaluator | None = None
        self.evaluation: OnlineEvaluation | None = None  # of the loop
        zero = optim.zero and ranks.world_size > 1
        self.optimizer = build_optimizer(optim.optimizer, model, settings.beta2, zero=zero)
        self.advance = self._train_step()
        masks = settings.model.masks_per_image
        self.step = PretrainStep(model, self.advance, settings.run.seed, ranks.rank, share, masks)
        self.state = RunState(model, self.optimizer, self.advance.scaler, self.position, pipeline, settings.stored())
        rate = matmul_rate(ranks.device, self.advance.dtype)  # on every rank, as they all compute at a time
        self.mfu = MfuMeter(count(model, masks), rate, ranks.device, ranks.world_size)

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint."""
        return self.state.size(TENSORS_KEPT[self.settings.optim.optimizer])

    def summary(self) -> RunSummary:
        """What is printed before the first step."""
        settings, model, device = self.settings, self.model, self.ranks.device
        encoder = sum(p.numel() for p in model.encoder.parameters())
        gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        height, width = model.grid
        return RunSummary(
            device=f"{device}{gpu}",
            precision=next(name for name, dtype in DTYPES.items() if dtype == self.advance.dtype),
            ranks=self.ranks.world_size,
            network=settings.network,
            parameters=(encoder, sum(p.numel() for p in model.parameters()) - encoder),
            drop_path=settings.drop_path,
            grid=model.grid,
            patch=(settings.size[0] // height, settings.size[1] // width),
            masked=height * width - model.num_visible,
            images=self.pipeline.num_samples,
            batch_size=settings.data.batch_size,
            steps_per_epoch=self.position.steps_per_epoch,
            epochs=self.position.epochs,
            step=self.position.step,
            warmup_epochs=settings.warmup_epochs,
            warmup_is_chosen=settings.optim.warmup_epochs != "auto",
            peak_lr=settings.peak_lr,
            method=settings.model.method,
            masks=settings.model.masks_per_image,
            evaluation="" if self.evaluator is None else self.evaluator.about,
            eval_every=settings.run.eval_every,
            in_chans=model.in_chans,
        )

    def open_evaluator(self, opened: OpenEvaluator, watchdog: Watchdog, interrupt: Interrupt) -> Evaluator:
        """Open what the loop evaluates with. Raises what `opened` does: DataError, SettingsError."""
        alive = stoppable(self.position, self.ranks, watchdog, interrupt)
        self.evaluator = opened(self.settings, self.ranks, self.advance.dtype, alive, self.pipeline.statistics)
        return self.evaluator

    def restore(self, paths: list[Path]) -> None:
        """Resume from the first of these checkpoints that can be read, at the next batch."""
        path, content = newest_readable(paths, read_resumable)
        if is_published(content):
            content = self._from_published(path, content)
        else:
            check_same_run(path, cast(RunContent, content), self.settings, self.pipeline)
        self.state.restore(path, cast(RunContent, content), self.ranks)

    def monitor(self, logger: RunLogger, profile: Profile | None = None) -> Monitor:
        """The monitor that collects the figures of the steps for `logger`."""
        return Monitor(
            logger,
            images_per_step=self.settings.data.batch_size,
            clock=self.advance.clock,
            rates=self.advance.schedule.at,
            mean_over_ranks=self.ranks.mean,
            mfu=self.mfu,
            spikes=Spikes(),
            profile=profile,
        )

    def logger(self, folder: Path | None) -> RunLogger:
        """The logger of the run; it shows nothing where `folder` is None."""
        run, at = self.settings.run, self.position
        return RunLogger(
            folder,
            total_steps=at.total_steps,
            steps_per_epoch=at.steps_per_epoch,
            epochs=at.epochs,
            step=at.step,
            loggers=open_loggers(folder, at.step, wandb=run.wandb, name=run.exp_name, config=self.settings.to_dict()),
        )

    def trainer(
        self, manager: CheckpointManager | None, pictured: Tensor | None, watchdog: Watchdog, interrupt: Interrupt
    ) -> Trainer:
        """The loop of this run.

        Args:
            manager: of the run folder, None on ranks that do not write.
            pictured: images (N, C, H, W) for the reconstruction pictures, None for no pictures.
        """
        run, folder = self.settings.run, None if manager is None else manager.folder
        logger = self.logger(folder)
        profile = Profile(folder, self.ranks.device, self.position.step) if run.profile else None
        if self.evaluator is not None:
            self.evaluation = OnlineEvaluation(
                self.evaluator, self.model.encoder.network, self.position, run.eval_every,
                logger=logger, ranks=self.ranks, watchdog=watchdog, folder=folder,
            )  # fmt: skip
        return Trainer(
            self.step,
            self.pipeline,
            self._checkpointer(manager),
            monitor=self.monitor(logger, profile),
            nonfinite=NonfiniteReport(self.advance.guard, self.ranks, self.settings.optim.max_bad_steps),
            end_of_epoch=EndOfEpoch(self, logger, folder, pictured),
            between_epochs=self.evaluation or (lambda: False),
            ranks=self.ranks,
            watchdog=watchdog,
            interrupt=interrupt,
            log_every=run.log_every,
            max_steps=run.max_steps,
            folder=folder,
        )

    def write_encoder(self, folder: Path) -> None:
        """Write the encoder's weights as they are now, under timm's names."""
        state, asked = renamed(self.model.state_dict(), self.encoder_names), self.settings
        write_encoder(state, asked.network, folder, asked.model.stages)

    @cached_property
    def encoder_names(self) -> dict[str, str]:
        """The encoder's tensors in the model -> in its file. timm's network is built for it, on the meta device."""
        return encoder_names(self.model, self.settings.network)

    def _checkpointer(self, manager: CheckpointManager | None) -> Checkpointer:
        steps, seconds = self.settings.save_every
        if manager is None:
            return Checkpointer(self.state, None, steps=steps, seconds=seconds)
        network, folder, stages = self.settings.network, manager.folder, self.settings.model.stages
        # not by the writing thread: networks are built for it on the meta device, for torch.compile the whole process's
        names = self.encoder_names

        def after_epoch(content: Content) -> None:
            write_encoder(renamed(content["model"], names), network, folder, stages)

        return Checkpointer(self.state, manager, steps=steps, seconds=seconds, after_epoch=after_epoch)

    def _from_published(self, path: Path, content: Content) -> Content:
        """A full checkpoint of the published code as one of this run; what it lacks keeps the run's initial value."""
        found = published_run(path, content, self.model, self.optimizer, in_published_names(self.settings))
        step = found["epoch"] * self.position.steps_per_epoch
        return {**found, "step": step, "random_state": random_state(), "scaler": self.advance.scaler.state_dict()}

    def _train_step(self) -> TrainStep:
        settings, optim, at = self.settings, self.settings.optim, self.position
        model = data_parallel(
            self.model.train(),
            self.ranks,
            static=optim.accumulate == 1,
            gradients_in_bf16=optim.allreduce == "bf16",
        )
        try:
            return TrainStep(
                compiled(model, settings.run.compile),
                self.optimizer,
                Schedule(
                    settings.peak_lr,
                    settings.warmup_epochs * at.steps_per_epoch,
                    at.total_steps,
                    optim.weight_decay,
                    optim.weight_decay_end or optim.weight_decay,
                    *self.model.recipe.schedule,
                ),
                precision=resolve_precision(settings.run.precision, self.ranks.device),
                device=self.ranks.device,
                clip=optim.clip,
                accumulate=optim.accumulate,
                agree=self.ranks.max,
                cuda_graph=settings.run.cuda_graph,
            )
        except ValueError as error:
            raise SettingsError(f"--cuda_graph: {error}") from error


class EndOfEpoch:
    """Ends an epoch: writes a line of log.txt, saves, and every few epochs draws `pictured`, (N, C, H, W)."""

    def __init__(self, run: PretrainRun, logger: RunLogger, folder: Path | None, pictured: Tensor | None) -> None:
        self.run, self.logger, self.folder, self.pictured = run, logger, folder, pictured

    def __call__(self, save: Callable[[], None]) -> None:
        """See `trainer.EpochEnd`."""
        at, settings, bad = self.run.position, self.run.settings.run, self.run.pipeline.bad_images
        self.logger.epoch(at.step, {"converted": bad.converted, "replaced": bad.substituted})
        save()
        if self.folder is not None and self.pictured is not None and at.epoch % settings.picture_every == 0:
            heading = f"epoch {at.epoch}, step {at.step}, loss {at.loss:.4f}"
            grid = reconstruction_grid(
                self.run.model,
                self.pictured,
                settings.seed,
                channels=settings.picture_channels,
                photographs=self.run.settings.photographs(),
            )
            grid = titled(grid, heading)
            save_png(grid, self.folder / "reconstruction" / f"epoch_{at.epoch:04d}.png")
            self.logger.picture(grid, at.step)


def kept_statistics(checkpoints: list[Path]) -> Statistics | None:
    """The statistics in the first of these checkpoints that can be read; None without one."""
    found = newest_readable(checkpoints, read_resumable)[1].get("statistics") if checkpoints else None
    return Statistics.from_dict(found) if found else None
