"""The command `spark-fast-train`: settings -> pipeline -> model -> loop.

Exit codes: 0 done, 2 settings, 3 data, 4 loss not finite, 5 stalled or another rank lost, 6 storage or checkpoint,
75 interrupted and saved.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from spark_fast.cli.start import start
from spark_fast.errors import SettingsError
from spark_fast.pipelines import Pipeline
from spark_fast.reporting.loggers import require_wandb
from spark_fast.run.command import open_pipeline, open_store, run_command, running
from spark_fast.run.cpu_sync_batchnorm import HostSyncBatchNorm
from spark_fast.run.distributed import Ranks
from spark_fast.run.folder import refuse_another_run
from spark_fast.run.malloc import keep_heap
from spark_fast.run.watchdog import Watchdog
from spark_fast.spark import SparK, build_spark
from spark_fast.training.dry_run import print_plan
from spark_fast.training.loop import PretrainRun
from spark_fast.training.resume import checkpoints_to_resume
from spark_fast.training.settings import Settings, parse
from spark_fast.weights.load import load_weights

PICTURED = 8  # images in a reconstruction picture


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("spark-fast-train", sys.argv[1:] if argv is None else argv, parse, pretrain)


def pretrain(settings: Settings, ranks: Ranks, watchdog: Watchdog) -> int:
    """Build everything, train to the end or to an interruption; returns the exit code."""
    if ranks.device.type == "cpu":
        keep_heap()
    if settings.run.wandb:
        require_wandb()
    with running(settings, ranks, watchdog) as (lock, closing):
        pipeline = open_images(settings, ranks, batch_size=settings.data.batch_size)
        closing.callback(pipeline.close)
        model = open_model(settings, ranks)
        resume = checkpoints_to_resume(settings)
        run = PretrainRun(settings, ranks, pipeline, model, watchdog)
        closing.callback(run.interrupt.release)
        if resume:
            run.restore(resume)
        elif settings.model.init_weight:
            load_weights(Path(settings.model.init_weight), model)
        if settings.run.dry_run:
            refuse_another_run(settings)
            print_plan(run)
            return 0
        if not ranks.main:
            return run.train(None, None)
        pictured = pictured_images(settings, ranks)
        keep_steps = settings.run.keep_every * run.steps_per_epoch
        return run.train(open_store(settings, lock, run, keep_steps, pictures="reconstruction"), pictured)


def open_images(settings: Settings, ranks: Ranks, *, batch_size: int, augment: bool = True) -> Pipeline:
    """The images of this rank."""
    return open_pipeline(
        settings,
        ranks,
        settings.data.data_path,
        batch_size=batch_size,
        augment=augment,
        ffcv_resize=settings.data.ffcv_resize,
        augment_on=settings.data.augment,
        decode_on=settings.data.decode,
    )


def pictured_images(settings: Settings, ranks: Ranks) -> Tensor | None:
    """A few images for the reconstruction pictures, the same ones all through the run, centrally cropped."""
    if not settings.run.picture_every:
        return None
    alone = replace(ranks, rank=0, world_size=1)
    if settings.data.pipeline != "synthetic":  # the one that reads anything and starts at once
        settings = replace(settings, data=replace(settings.data, pipeline="torch", decode="host", augment="host"))
    pipeline = open_images(settings, alone, batch_size=min(PICTURED, settings.data.batch_size), augment=False)
    try:
        return next(iter(pipeline.epoch(0))).images
    finally:
        pipeline.close()


def open_model(settings: Settings, ranks: Ranks) -> SparK:
    """The model on this rank's device, channels_last."""
    synced = settings.run.sync_batchnorm and ranks.world_size > 1
    try:
        model = build_spark(
            settings.network,
            input_size=settings.size,
            mask_ratio=settings.model.mask_ratio,
            decoder_width=settings.model.decoder_width,
            encoder=settings.encoder,
            model_kwargs={"drop_path_rate": settings.drop_path} if settings.drop_path else None,
            stages=settings.model.stages or None,
            check={"auto": None, "always": True, "never": False}[settings.model.verify],
            sync_batchnorm=synced and ranks.device.type == "cuda",
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if synced and ranks.device.type == "cpu":
        HostSyncBatchNorm.replace_in(model)
    return model.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(start("train"))
