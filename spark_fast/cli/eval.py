"""The command `spark-fast-eval`: evaluate an encoder by nearest neighbours, a linear probe, or fine-tuning.

    spark-fast-eval finetune NAME --data_path imagenet --weights output_my_run
    torchrun --nproc_per_node=8 -m spark_fast.evaluate knn NAME --data_path imagenet --weights resnet50_timm.safetensors

Exit codes: see `spark_fast.errors`.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from spark_fast.checkpoint.file import RunContent
from spark_fast.checkpoint.manager import read_newest
from spark_fast.cli.start import start
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.evaluation.accuracy import Scores
from spark_fast.evaluation.backbone import build_backbone, build_classifier
from spark_fast.evaluation.data import Labelled, central, open_train, open_val
from spark_fast.evaluation.eval_settings import Evaluation, Finetune, Knn, Linear, parse
from spark_fast.evaluation.features import Features, extract, frozen
from spark_fast.evaluation.finetune import FinetuneRun
from spark_fast.evaluation.knn import classify_by_neighbours
from spark_fast.evaluation.linear_probe import LinearProbe, shuffled, train_probe
from spark_fast.evaluation.report import Report
from spark_fast.networks import takes_drop_path
from spark_fast.pipelines import Pipeline, View
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.run.command import code_when_stopped, open_checkpoints, open_folder, run_command, running
from spark_fast.run.distributed import Ranks
from spark_fast.run.lock import RunLock
from spark_fast.run.run_folder import refuse_another_run
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.resume import checkpoints_to_resume
from spark_fast.training.step import DTYPES, resolve_precision
from spark_fast.weights.read import Weights, read_weights

log = logging.getLogger("spark_fast")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("spark-fast-eval", sys.argv[1:] if argv is None else argv, parse, evaluate)


def evaluate(settings: Evaluation, ranks: Ranks, watchdog: Watchdog) -> int:
    """Evaluate in the mode of the settings; returns the exit code."""
    with running(settings, ranks, watchdog) as (lock, closing):
        if isinstance(settings, Finetune):
            return finetune(settings, ranks, watchdog, lock, closing)
        return on_features(settings, ranks, watchdog, lock, closing)


def on_features(asked: Evaluation, ranks: Ranks, watchdog: Watchdog, lock: RunLock, closing: ExitStack) -> int:
    """k-NN or a linear probe: the network is frozen."""
    refuse_another_run(asked.folder, resumable=False)
    weights = _weights(asked)
    settings = asked.resolved(*_network(asked, weights))
    backbone = build_backbone(settings.network, settings.model.stages, weights, settings.in_chans)
    features = frozen(backbone, ranks.device, DTYPES[resolve_precision(settings.run.precision, ranks.device)])
    fresh = isinstance(settings, Linear) and settings.is_shuffled
    statistics = weights.statistics if weights else None
    view = View(scale=(0.08, 1.0), shuffle_block=settings.data.shuffle_block) if fresh else central(settings)
    train = open_train(settings, ranks, view, statistics)
    learned = Labelled(train, train.num_classes, None, lambda step: watchdog.at(step, "reading the training images"))
    closing.callback(learned.close)
    val = open_val(settings, ranks, train, lambda step: watchdog.at(step, "reading the validation images"))
    closing.callback(val.close)
    _check_sizes(settings, train)
    report = Report(open_folder(settings, lock) if ranks.main else None)
    closing.callback(report.close)
    queries = extract(features, val)
    if isinstance(settings, Knn):
        scores = classify_by_neighbours(
            extract(features, learned),
            queries,
            k=settings.knn.k,
            temperature=settings.knn.temperature,
            classes=train.num_classes,
            ranks=ranks,
            alive=lambda step: watchdog.at(step, "looking for neighbours"),
        )
    else:
        assert isinstance(settings, Linear)
        scores = _probe(settings, ranks, learned, features, queries, fresh, report)
    seen = {"train_images": train.num_samples, "replaced": val.pipeline.bad_images.substituted}
    found = {"mode": settings.mode, **scores.accuracy(), **seen, "settings": settings.to_dict()}
    report.result(scores.confusion, train.classes, **found)
    return 0


def _probe(
    settings: Linear,
    ranks: Ranks,
    train: Labelled,
    features: Features,
    queries: tuple[Tensor, Tensor],
    fresh: bool,
    report: Report,
) -> Scores:
    """Train a linear layer, and judge it after every epoch; the scores of the last one."""
    batch_size, images = settings.batch_size, train.pipeline.num_samples
    steps = images // batch_size
    batches = (
        train.seen_through(features)
        if fresh
        else shuffled(*extract(features, train), batch_size // ranks.world_size, steps, settings.run.seed)
    )
    channels = max(ranks.gather(queries[0].shape[1]))
    probe = LinearProbe(channels, train.num_classes).to(ranks.device)
    scores = Scores(train.num_classes, ranks.device)

    def tell(epoch: int, loss: float, rate: float) -> None:
        nonlocal scores
        probe.eval()
        scores = Scores(train.num_classes, ranks.device)
        if len(queries[1]):
            with torch.no_grad():
                scores.add(probe(queries[0]), queries[1])
        found = scores.reduce(ranks).accuracy()
        text = f"epoch {epoch}/{settings.probe.epochs}  loss {loss:.4f}  top-1 {found['top1']:.2f} %"
        report.epoch(epoch * steps, text, epoch=epoch, loss=loss, lr=rate, top1=found["top1"], top5=found["top5"])

    train_probe(probe, batches, steps, settings.probe, batch_size, ranks, tell)
    return scores


def finetune(asked: Finetune, ranks: Ranks, watchdog: Watchdog, lock: RunLock, closing: ExitStack) -> int:
    """Train the whole network."""
    if not asked.run.resume:
        refuse_another_run(asked.folder)
    checkpoints = checkpoints_to_resume(asked.run.resume, asked.folder)
    before = read_newest(checkpoints) if checkpoints else None
    weights = None if before else _weights(asked)
    network, stages, in_chans = _resumed(asked, *before) if before else _network(asked, weights)
    statistics = _statistics(before[1]) if before else weights.statistics if weights else None
    settings = asked.resolved(network, stages, in_chans, statistics)
    recipe = settings.whole_recipe
    if asked.recipe.drop_path is None and recipe.drop_path and not takes_drop_path(network):
        log.info("%s takes no drop_path_rate: it is fine-tuned without the recipe's --drop_path", network)
        recipe.drop_path = 0.0
    block = settings.data.shuffle_block
    view = View(scale=(recipe.min_scale, 1.0), repeats=recipe.repeats, shuffle_block=block)
    train = open_train(settings, ranks, view, statistics)
    closing.callback(train.close)
    val = open_val(settings, ranks, train, lambda step: watchdog.at(step, "judging"))
    closing.callback(val.close)
    model = build_classifier(network, stages, weights, train.num_classes, recipe.drop_path, settings.size, in_chans)
    interrupt = Interrupt()
    closing.callback(interrupt.release)
    run = FinetuneRun(settings, ranks, train, val, model)
    if before:
        run.restore(*before)
    at, manager = run.position, None
    if ranks.main:
        size, keep_last = run.checkpoint_bytes, settings.run.keep_last
        manager = open_checkpoints(settings, lock, size=size, step=at.step, keep_last=keep_last)
    report = Report(manager.folder if manager else None, at.step)
    closing.callback(report.close)
    if not run.trainer(manager, report, watchdog, interrupt).train():
        return code_when_stopped(settings.folder)
    run.write_result(report)
    return 0


def _weights(settings: Evaluation) -> Weights | None:
    return None if settings.model.weights == "none" else read_weights(Path(settings.model.weights))


def _network(settings: Evaluation, weights: Weights | None) -> tuple[str, int, int]:
    """Name, stages and channels of the images: as asked, or as the weights say."""
    name = weights.choose_network(settings.network) if weights else settings.network
    if not name:
        raise SettingsError(f"--model is missing: {weights.unknown() if weights else 'with --weights none'}")
    if weights is None:
        return name, settings.model.stages, settings.in_chans
    asked, known = settings.model.stages, weights.stages(name)
    if known and asked > known:
        raise SettingsError(f"--stages {asked}: only the first {known} levels of {weights.path} were pre-trained")
    return name, asked or known, settings.data.in_chans or weights.in_chans(name)


def _resumed(settings: Finetune, path: Path, state: RunContent) -> tuple[str, int, int]:
    """Name, stages and channels: as asked, or as the checkpoint says, so that --weights need not be there any more."""
    try:
        before, in_chans = state["settings"]["model"], state["settings"]["data"].get("in_chans", 3)
        stages = settings.model.stages or before["stages"]
        return settings.network or before["model"], stages, settings.data.in_chans or in_chans
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} is not a checkpoint of a fine-tuning run") from None


def _statistics(before: RunContent) -> Statistics | None:
    """The statistics that the earlier fine-tuning run was normalised by."""
    return Statistics.from_dict(before["statistics"]) if before.get("statistics") else None


def _check_sizes(settings: Evaluation, train: Pipeline) -> None:
    if isinstance(settings, Knn) and settings.knn.k > train.num_samples:
        raise SettingsError(f"--k {settings.knn.k} is larger than the number of training images, {train.num_samples}")
    if isinstance(settings, Linear) and settings.batch_size > train.num_samples:
        raise SettingsError(
            f"--batch_size {settings.batch_size} is larger than the number of training images, {train.num_samples}"
        )


if __name__ == "__main__":
    sys.exit(start("eval"))
