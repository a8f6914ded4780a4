"""What `learning.py` runs, each by the product's own parts in one process: pre-training, fine-tuning, a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from learning_images import Images
from learning_memory import Memory, MemoryKnn
from learning_methods import FCMAE_VARIANT, SIZE, STAGES, Finetuning, Pretraining, build, own
from measuring import clock, medians
from torch import Tensor
from ways import Shape, Way, inputs, train_step

from spark_fast.evaluation import eval_settings as evaluation
from spark_fast.evaluation.accuracy import judge
from spark_fast.evaluation.backbone import build_classifier
from spark_fast.evaluation.data import Labelled, central, open_train, open_val
from spark_fast.evaluation.finetune import FinetuneRun
from spark_fast.evaluation.online_knn import OnlineKnn
from spark_fast.evaluation.recipes import Recipe
from spark_fast.evaluation.report import Report
from spark_fast.method import Method
from spark_fast.pipelines import Pipeline, View
from spark_fast.reporting.metrics_file import read_metrics
from spark_fast.run.command import open_checkpoints, running
from spark_fast.run.distributed import Ranks
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training import settings as training
from spark_fast.training.pretrain import open_images
from spark_fast.training.pretrain_run import PretrainRun
from spark_fast.training.resume import checkpoints_to_resume
from spark_fast.training.step import DTYPES, resolve_precision
from spark_fast.weights.read import read_weights

WARMUP = 0.1  # of a run: where the whole is an epoch, a part of that
TIMEOUT = 600.0
SAVE_EVERY = "2min"  # of a pre-training: what is lost when it is killed
LOADED = 30  # batches that the cost of loading is measured on

Clock = Callable[[torch.device], float]


class Bench:
    """Where everything runs: the data, the device, and what all runs share."""

    def __init__(self, images: Images, out: Path, device: torch.device, options: Any) -> None:
        self.images, self.out, self.options = images, out, options
        self.ranks = Ranks(0, 1, device)
        self.memory = Memory(out / "decoded", device) if options.in_memory else None
        self.precision: Any = resolve_precision(options.precision, device)

    def weights(self, run: Pretraining) -> Path:
        """The encoder that a pre-training leaves."""
        return self.out / "weights" / run.name / "encoder.safetensors"

    def do(self, job: Any) -> dict[str, Any]:
        """The row of a run: see `learning_plan.Job`."""
        return getattr(self, job.does)(job.run)

    def pretrain(self, run: Pretraining) -> dict[str, Any]:
        """Pre-train, from its newest checkpoint on where there is one, and keep the encoder.

        Returns:
            the last loss, the steps, and of each evaluation the step and top-1 of k-NN in percent.
        """
        settings, watchdog = self._settings(run), Watchdog(TIMEOUT)
        with running(settings, self.ranks, watchdog) as (lock, closing):
            resume = checkpoints_to_resume(settings.run.resume, settings.folder)
            pipeline = self._open_images(settings, self._passes(run))
            closing.callback(pipeline.close)
            training = PretrainRun(settings, self.ranks, pipeline, self._model(run))
            interrupt = Interrupt()
            closing.callback(interrupt.release)
            if run.judged:
                knn = partial(MemoryKnn, self.memory) if self.memory else OnlineKnn
                closing.callback(training.open_evaluator(knn, watchdog, interrupt).close)
            if resume:
                training.restore(resume)
            at = training.position
            manager = open_checkpoints(settings, lock, size=training.checkpoint_bytes, step=at.step, keep_last=2)
            if not training.trainer(manager, None, watchdog, interrupt).train():
                raise KeyboardInterrupt
            training.write_encoder(manager.folder)
        rows = read_metrics(settings.folder / "metrics.jsonl")
        points = [[int(row["step"]), row["knn_top1"]] for row in rows if "knn_top1" in row]
        return {"loss": at.loss, "steps": at.total_steps, "knn": points}

    def finetune(self, run: Finetuning) -> dict[str, float]:
        """Fine-tune, and judge once, at the end; returns top-1 in percent."""
        settings = self._finetune_settings(run)
        weights = read_weights(self.weights(run.before)) if run.before else None
        torch.manual_seed(run.seed)
        train = self._open_train(settings, View(scale=(settings.recipe.min_scale, 1.0)), self._passes(run))
        watched = self._open_val(settings, train)
        settings.data.val_path = str(self.images.held_out() if run.held_out else self.images.test)
        judged = self._open_val(settings, train)
        drop_path = settings.recipe.drop_path or 0.0
        model = build_classifier(
            settings.network, STAGES, weights, train.num_classes, drop_path, settings.size, self.options.channels
        )
        with _running(train, watched, judged) as interrupt:
            tuning = FinetuneRun(settings, self.ranks, train, watched, model)
            if not tuning.trainer(None, Report(None), Watchdog(TIMEOUT), interrupt).train():
                raise KeyboardInterrupt
            classify = partial(self._classify, tuning.network.eval())
            return judge(classify, judged, self.ranks).accuracy()

    def seconds_per_step(self, runs: dict[str, Pretraining], repeats: int, now: Clock = clock) -> dict[str, float]:
        """Median seconds of a step of each run, in turns."""
        device, way = self.ranks.device, Way(precision=self.precision)
        optimizer = self.options.optimizer if self.memory else ""  # few launches or many: on a GPU that counts
        steps: dict[str, Callable[[], tuple[float, ...]]] = {}
        for name, run in runs.items():
            model = self._model(run)
            shape = Shape(run.network, SIZE, run.mask, self.options.batch, run.width, masks=run.masks)
            model.encoder.context.kernels = None
            batch = inputs(model, shape, way, device)
            steps[name] = partial(_timed, partial(train_step(way, model, device, optimizer), 0, *batch), device, now)
        return {name: seconds for name, (seconds,) in medians(steps, repeats).items()}

    def step_costs(self, runs: dict[str, Pretraining]) -> dict[str, Any]:
        """What a step of each run costs, its batch included, in seconds of training.

        On a CPU these are seconds that this one thread computes: what else the machine is busy with does not count.
        There the loading adds to a step, as it does where the images are in memory; else it goes on meanwhile on a
        GPU, and the longer of the two counts.

        Returns:
            `of`: by the runs' names; `loading`: of a batch, in seconds that the cores compute, or, on a GPU with the
            images in memory, that pass.
        """
        on_cpu, workers = self.ranks.device.type == "cpu", self.options.workers
        now = clock if self.memory and not on_cpu else _computed
        steps = self.seconds_per_step(runs, self.options.step_repeats, _computed if on_cpu else clock)
        settings = self._settings(next(iter(runs.values())))
        with closing(self._open_images(settings)) as pipeline:
            begun, batches = now(self.ranks.device), len(pipeline)
            if not self.memory:  # there a whole pass is prepared at once
                batches = min(batches, LOADED)
            with closing(pipeline.epoch(0)) as epoch:
                for _ in range(batches):
                    next(epoch)
            loading = (now(self.ranks.device) - begun) / batches
        adds = on_cpu or self.memory is not None
        whole = {name: s + loading if adds else max(s, loading / workers) for name, s in steps.items()}
        return {"of": whole, "loading": loading}

    def decode(self) -> None:
        """Decode for the memory what all runs share, so that none of them has to."""
        if self.memory:
            self._open_images(self._settings(Pretraining(self.options.networks[0], 1, self.options.width))).close()

    def _passes(self, run: Pretraining | Finetuning) -> int:
        """Passes over the images in an epoch of the trainer: in memory, all from one evaluation to the next."""
        points = run.points if isinstance(run, Pretraining) else 1
        return run.epochs // points if self.memory and run.epochs % points == 0 else 1

    def _open_images(self, settings: training.Settings, passes: int = 1) -> Pipeline:
        if self.memory:
            view = View(scale=settings.crop_scale)
            return self.memory.open(settings, settings.data.data_path, view, self.options.batch, passes)
        return open_images(settings, self.ranks, batch_size=self.options.batch)

    def _open_train(self, settings: Any, view: View, passes: int) -> Pipeline:
        if self.memory:
            return self.memory.open(settings, settings.data.data_path, view, settings.batch_size, passes)
        return open_train(settings, self.ranks, view)

    def _open_val(self, settings: Any, train: Pipeline) -> Labelled:
        data = open_val(settings, self.ranks, train, lambda step: None)
        if self.memory:
            self.memory.hold(data, settings, settings.data.val_path, central(settings, "all"))
        return data

    def _model(self, run: Pretraining) -> Method:
        torch.manual_seed(run.seed)
        return build(run, self.options.channels).to(self.ranks.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def _settings(self, run: Pretraining) -> training.Settings:
        options, epochs = self.options, run.epochs // self._passes(run)
        judged = {"": "", "test": self.images.knn, "tuning": self.images.tuning()}[run.judged]
        return training.Settings(
            training.Data(
                str(self.images.some(run.images)),
                str(judged),
                input_size=str(SIZE),
                in_chans=options.channels,
                mean=options.mean,
                std=options.std,
                batch_size=options.batch,
                workers=options.workers,
            ),
            training.Model(
                method="fcmae" if run.variant == FCMAE_VARIANT else "spark", model=own(run.network), stages=STAGES,
                mask_ratio=run.mask, masks_per_image=run.masks, decoder_width=run.width,
            ),
            training.Optim(
                epochs, WARMUP * epochs, run.lr or options.base_lr, options.optimizer,  # type: ignore[arg-type]
            ),
            training.Run(
                "learning", str(self.weights(run).parent), resume="auto", seed=run.seed, precision=self.precision,
                save_every=SAVE_EVERY, picture_every=0,
                eval_every=max(1, epochs // run.points) if run.judged else 0,
            ),
        )  # fmt: skip

    def _finetune_settings(self, run: Finetuning) -> Any:
        options, epochs = self.options, run.epochs // self._passes(run)
        learned = self.images.labelled(run.share, run.seed, run.held_out)
        batch = min(options.tune_batch, max(1, round(run.share * len(self.images)) // 4))
        return evaluation.Finetune(
            evaluation.Data(
                str(learned), str(self.images.watched()), input_size=str(SIZE), in_chans=options.channels,
                batch_size=batch, crop_pct=1.0, workers=options.workers, mean=options.mean, std=options.std,
            ),
            evaluation.Model("none", own(run.network), STAGES),
            evaluation.FinetuneRunSettings("learning", seed=run.seed, precision=self.precision),
            Recipe(
                epochs=epochs, warmup_epochs=WARMUP * epochs,  # type: ignore[arg-type]
                base_lr=run.lr * 256 / batch, optimizer="adamw", loss="ce", layer_decay=1.0, weight_decay=0.05,
                mixup=0.0, cutmix=0.0, smoothing=0.1, repeats=1, augment="none", erase=0.0,
                min_scale=options.min_scale, drop_path=0.0, ema=0.0, clip=1.0,
            ),
        ).resolved(own(run.network), STAGES, options.channels)  # fmt: skip

    def _classify(self, network: Any, images: Tensor) -> Tensor:
        dtype = DTYPES[self.precision]
        with torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32):
            return network(images)


def _timed(step: Callable[[], object], device: torch.device, now: Clock) -> tuple[float]:
    begun = now(device)
    step()
    return (now(device) - begun,)


def _computed(device: torch.device) -> float:
    """Seconds that this process has computed, all its threads together."""
    return time.process_time()


@contextmanager
def _running(*opened: Pipeline | Labelled) -> Iterator[Interrupt]:
    interrupt = Interrupt()
    try:
        yield interrupt
    finally:
        interrupt.release()
        for each in opened:
            each.close()
