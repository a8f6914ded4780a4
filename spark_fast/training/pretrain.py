"""Pre-training from its settings: build the parts, hand them to the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spark_fast.errors import SettingsError
from spark_fast.masking import check_masks
from spark_fast.method import Method, build
from spark_fast.pipelines import LoaderOptions, Pipeline, View
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.reporting.loggers import require_wandb
from spark_fast.reporting.run_summary import nothing_learned
from spark_fast.run.command import open_checkpoints, open_pipeline, running
from spark_fast.run.distributed import Ranks
from spark_fast.run.run_folder import refuse_another_run
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.dry_run import print_estimate
from spark_fast.training.pretrain_run import OpenEvaluator, PretrainRun, kept_statistics
from spark_fast.training.resume import checkpoints_to_resume
from spark_fast.training.settings import Settings, method_of
from spark_fast.weights.load import load_weights

log = logging.getLogger("spark_fast")

PICTURED = 8  # images in a reconstruction picture


@dataclass(frozen=True)
class PretrainResult:
    """What a call of pre-training leaves.

    Attributes:
        folder: of the run.
        metrics: the row of the last log point, as in metrics.jsonl, and the figures of the last evaluation; {} where
            this process took no step and made none.
        finished: False where it was interrupted, or stopped by `max_steps`: the same call with resume="auto" goes on.
    """

    folder: Path
    metrics: dict[str, float]
    finished: bool


def pretrain_from_settings(
    settings: Settings, ranks: Ranks, watchdog: Watchdog, open_evaluator: OpenEvaluator
) -> PretrainResult:
    """Build everything, and train to the end or to an interruption; with `dry_run`, print what it would cost.

    `open_evaluator` is called where `--eval_every` asks for it.
    """
    if settings.run.wandb:
        require_wandb()
    with running(settings, ranks, watchdog) as (lock, closing):
        resume = checkpoints_to_resume(settings.run.resume, settings.folder)
        pipeline = open_images(
            settings, ranks, batch_size=settings.data.batch_size, kept=lambda: kept_statistics(resume)
        )
        closing.callback(pipeline.close)
        model = open_model(settings, ranks)
        interrupt = Interrupt()
        closing.callback(interrupt.release)
        run = PretrainRun(settings, ranks, pipeline, model)
        if settings.run.eval_every:
            closing.callback(run.open_evaluator(open_evaluator, watchdog, interrupt).close)
        if resume:
            run.restore(resume)
        elif settings.model.init_weight:
            load_weights(Path(settings.model.init_weight), model)
        if settings.run.dry_run:
            interrupt.release()  # there is nothing to save
            if not settings.run.resume:
                refuse_another_run(settings.folder)
            _tell(run)
            print_estimate(run)
            return PretrainResult(settings.folder, {}, finished=True)
        pictured = manager = None
        if ranks.main:
            pictured = pictured_images(settings, ranks, pipeline.statistics)
            manager = open_checkpoints(
                settings,
                lock,
                size=run.checkpoint_bytes,
                step=run.position.step,
                keep_last=settings.run.keep_last,
                keep_steps=settings.run.keep_every * run.position.steps_per_epoch,
                pictures="reconstruction",
            )
        _tell(run)
        trainer = run.trainer(manager, pictured, watchdog, interrupt)
        finished = trainer.train()
        if finished and manager is not None:
            run.write_encoder(manager.folder)  # also when a finished run is resumed
            at = run.position
            print(f"done: {at.step} steps, loss {at.loss:.4f}; everything is in {manager.folder}/", flush=True)
            if doubt := nothing_learned(at.loss):
                log.warning(doubt)
        evaluated = run.evaluation.last if run.evaluation else {}
        return PretrainResult(settings.folder, trainer.monitor.last | evaluated, finished)


def _tell(run: PretrainRun) -> None:
    """On the first rank: what the run is, and what speaks against it."""
    if not run.ranks.main:
        return
    summary = run.summary()
    print(summary.text(), flush=True)
    for doubt in summary.doubts():
        log.warning(doubt)


def open_images(
    settings: Settings,
    ranks: Ranks,
    *,
    batch_size: int,
    augment: bool = True,
    kept: Callable[[], Statistics | None] = lambda: None,
) -> Pipeline:
    """The images of this rank; `kept`: see `open_pipeline`."""
    options = LoaderOptions(
        batch_size,
        ffcv_resize=settings.data.ffcv_resize,
        augment_on=settings.data.augment,
        decode_on=settings.data.decode,
        view=View(
            shuffle_block=settings.data.shuffle_block,
            augment=augment,
            scale=settings.crop_scale,
            flip=settings.data.hflip,
            vflip=settings.data.vflip,
            rot90=settings.data.rot90,
        ),
    )
    return open_pipeline(settings, ranks, settings.data.data_path, options, kept)


def pictured_images(settings: Settings, ranks: Ranks, statistics: Statistics | None = None) -> Tensor | None:
    """At most PICTURED images for the reconstruction pictures, (N, C, H, W): normalised, centrally cropped.

    They are the same ones all through the run; None where no pictures are asked for. `statistics`: of the run's images.
    """
    if not settings.run.picture_every:
        return None
    alone = replace(ranks, rank=0, world_size=1)
    if settings.data.pipeline != "synthetic":  # the one that reads anything, and without processes starts at once
        plain = replace(settings.data, pipeline="torch", decode="host", augment="host", worker_processes=0)
        settings = replace(settings, data=plain)
    batch_size = min(PICTURED, settings.data.batch_size)
    pipeline = open_images(settings, alone, batch_size=batch_size, augment=False, kept=lambda: statistics)
    try:
        return next(iter(pipeline.epoch(0))).images
    finally:
        pipeline.close()


def open_model(settings: Settings, ranks: Ranks) -> Method:
    """The model on this rank's device, channels_last."""
    kind = method_of(settings.model.method)
    try:
        model = build(
            kind,
            settings.network,
            input_size=settings.size,
            mask_ratio=settings.model.mask_ratio,
            encoder=settings.encoder,
            model_kwargs={"drop_path_rate": settings.drop_path} if settings.drop_path else None,
            stages=settings.model.stages or None,
            in_chans=settings.in_chans,
            check={"auto": None, "always": True, "never": False}[settings.model.verify],
            sync_batchnorm=settings.run.sync_batchnorm and ranks.world_size > 1,
            **{name: getattr(settings.model, name) for name in kind.options},
        )
        check_masks(model.grid, model.num_visible, settings.model.masks_per_image)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return model.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
