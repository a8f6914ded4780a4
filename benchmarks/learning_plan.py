"""Part `evidence` of `learning.py`: which runs, in which order, as a function of those that are finished.

Every arm is treated alike. Its rate of pre-training is the one of a grid that, after a short trial with a seed of its
own, classifies held-out training images best by k-NN. Then it is pre-trained with each seed. Its rate of fine-tuning,
for each share of labels, is the one of a grid that does best on held-out training images. So no figure of the test
set decides anything. At SparK's seconds an arm takes the rates that it was tuned for at equal passes, if it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from learning_forms import Options
from learning_methods import FCMAE_VARIANT, PUBLISHED, Finetuning, Pretraining

SCRATCH = "scratch"
FCMAE, FCMAE_4 = "FCMAE", "FCMAE x 4"
SAME_SECONDS = ", SparK's seconds"
TIMED = (PUBLISHED, FCMAE, FCMAE_4)
STEPS = "seconds of a step"

Rows = dict[str, dict[str, Any]]


class Job(NamedTuple):
    """A run: its key in the record, the method of `Bench` that does it, what of, and what its row says besides."""

    key: str
    does: str
    run: Any
    about: dict[str, Any]


class Arm(NamedTuple):
    """What is compared: a pre-training without its rate and seed; None: no pre-training."""

    name: str
    before: Pretraining | None
    same_seconds: bool = False  # as SparK with all its passes
    tuned: bool = True  # by itself; else it takes the rates of the arm `tuned_as`

    @property
    def tuned_as(self) -> str:
        """The arm at equal passes."""
        return self.name.removesuffix(SAME_SECONDS)


def arms(options: Options) -> tuple[list[Arm], list[Arm]]:
    """Those that matter most, and the others; of both, those that are asked for."""
    plain = Pretraining(options.networks[0], options.epochs, options.width, judged="test")
    watched = replace(plain, points=options.points)
    fcmae = replace(watched, variant=FCMAE_VARIANT, width=options.fcmae_width)
    fcmae_4 = replace(fcmae, mask=0.75, masks=4)
    masks = [Arm(f"mask {mask:g}", replace(plain, mask=mask)) for mask in options.masks]
    first = [
        Arm(SCRATCH, None),
        Arm(PUBLISHED, watched),
        Arm("zero-outing", replace(plain, variant="zero-outing")),
        Arm(FCMAE, fcmae),
        Arm("no hierarchy", replace(plain, variant="no hierarchy")),
        Arm("loss on all patches", replace(plain, variant="loss on all patches")),
        *masks[:2],
        Arm(FCMAE_4, fcmae_4),
        Arm(FCMAE + SAME_SECONDS, fcmae, same_seconds=True),
        Arm(FCMAE_4 + SAME_SECONDS, fcmae_4, same_seconds=True),
    ]
    widths = [w for w in options.widths if w != options.width]
    others = [*masks[2:], *(Arm(f"decoder {w}", replace(plain, width=w)) for w in widths)]
    asked = options.arms or [arm.name for arm in (*first, *others)]
    first = [arm._replace(tuned=not arm.same_seconds or arm.tuned_as not in asked) for arm in first]
    return [arm for arm in first if arm.name in asked], [arm for arm in others if arm.name in asked]


def plan(options: Options, rows: Rows) -> Iterator[Job]:
    """Every run that is done, or can be begun now, the most important first: arm by arm, with all seeds of each.

    So a part of the runs decides some directions, where it would leave all of them open seed by seed.
    """
    timed = {arm.tuned_as: arm.before for arm in arms(options)[0] if arm.tuned_as in TIMED and arm.before}
    yield Job(STEPS, "step_costs", timed, {"runs": {name: asdict(run) for name, run in timed.items()}})
    for group in arms(options):
        for arm in group:
            for seed in range(options.pretrainings):
                yield from _of_arm(options, rows, arm, seed)


def expected(options: Options) -> int:
    """How many runs there are in all."""
    everyone = [arm for group in arms(options) for arm in group]
    tuned = [arm for arm in everyone if arm.tuned]
    trials = len(options.pretrain_lr) * sum(arm.before is not None for arm in tuned)
    swept = len(options.sweep_lr) * len(options.shares) * len(tuned)
    pretrained = options.pretrainings * sum(arm.before is not None for arm in everyone)
    finetuned = options.seeds * len(options.shares) * len(everyone)
    return 1 + trials + swept + pretrained + finetuned


def passes(options: Options, rows: Rows, arm: str) -> int | None:
    """Passes over the images in the seconds that SparK takes for its own; None: a step is not measured yet.

    With the images in memory they are a multiple of the evaluations, as an epoch lasts from one to the next.
    """
    if STEPS not in rows:
        return None
    seconds, whole = rows[STEPS]["of"], options.points if options.in_memory else 1
    return max(1, round(options.epochs * seconds[PUBLISHED] / seconds[arm] / whole)) * whole


def trials(options: Options, arm: Arm) -> list[Job]:
    """The short pre-trainings that its rate is chosen by."""
    assert arm.before is not None
    short = replace(
        arm.before, epochs=options.trial_epochs, judged="tuning", points=1, seed=options.pretrainings
    )  # a seed that no result has
    return [pretraining_job(f"{arm.tuned_as} tuned", replace(short, lr=lr)) for lr in options.pretrain_lr]


def sweep(options: Options, arm: Arm, before: Pretraining | None, share: float, epochs: int) -> list[Job]:
    """The fine-tunings that its rate with this share of labels is chosen by."""
    run = Finetuning(options.networks[0], before, share, epochs, 0.0, options.pretrainings, held_out=True)
    return [finetuning_job(f"{arm.tuned_as} swept", replace(run, lr=lr)) for lr in options.sweep_lr]


def best(rows: Rows, jobs: list[Job], figure: Callable[[dict[str, Any]], float]) -> float | None:
    """The rate of the run with the highest figure, the lower one of equals; None while one is not finished."""
    if any(job.key not in rows for job in jobs):
        return None
    return max(jobs, key=lambda job: figure(rows[job.key])).run.lr


def last_knn(row: dict[str, Any]) -> float:
    """k-NN after the last step of a pre-training, in percent."""
    return row["knn"][-1][1]


def _of_arm(options: Options, rows: Rows, arm: Arm, seed: int) -> Iterator[Job]:
    """The runs of one arm with one seed that can be begun."""
    before = arm.before
    if before is not None:
        tried = trials(options, arm)
        if seed == 0 and arm.tuned:
            yield from tried
        lr = best(rows, tried, last_knn)
        epochs = passes(options, rows, arm.tuned_as) if arm.same_seconds else options.epochs
        if lr is None or epochs is None:
            return
        before = replace(before, lr=lr, epochs=epochs, seed=seed)
        if not arm.tuned and epochs == options.epochs and pretraining_job(arm.tuned_as, before).key not in rows:
            return  # it is that very run, in the same folder: once finished, it is found there
        job = pretraining_job(arm.name, before)
        yield job
        if job.key not in rows:
            return
    for share, tune_epochs in zip(options.shares, options.tune_epochs, strict=True):
        tuned = before and replace(before, epochs=before.epochs if arm.tuned else options.epochs, seed=0)
        swept = sweep(options, arm, tuned, share, tune_epochs)
        if seed == 0 and arm.tuned:
            yield from swept
        rate = best(rows, swept, lambda row: row["top1"])
        if rate is None:
            continue
        for own in range(seed, options.seeds, options.pretrainings):
            yield finetuning_job(arm.name, Finetuning(options.networks[0], before, share, tune_epochs, rate, own))


def pretraining_job(arm: str, run: Pretraining) -> Job:
    """A pre-training of an arm; its key is not that of the same pre-training in another arm."""
    return Job(f"{arm}: {run.name}", "pretrain", run, {"arm": arm, "run": asdict(run)})


def finetuning_job(arm: str, run: Finetuning) -> Job:
    """A fine-tuning of an arm."""
    about = {"arm": arm, "run": asdict(run)}
    return Job(json.dumps([*about.values()]), "finetune", run, about)
