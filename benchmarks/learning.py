"""Does pre-training pay? Fine-tuned with few labels and with all, against the same network from scratch, on CIFAR-10.

    python benchmarks/learning.py --form cpu --data cifar10.tar.gz --out /tmp/learning
    python benchmarks/learning.py --form gpu --data cifar10.tar.gz --out /tmp/learning

64 px, patches of 8 px. Parts: `main`, each network and share of labels; `ablations`, the choices of the paper undone
one at a time; `decoder`, its width, with the seconds of a step; `sweep`, the learning rates of both arms, judged by
training images that are held out. Every run that is finished is a line of OUT/runs.jsonl, so the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from learning_runs import PUBLISHED, VARIANTS, Bench, Finetuning, Images, Pretraining
from learning_table import markdown, put_between_marks
from measuring import machine, save, versions

from spark_fast.run.config import take_option
from spark_fast.run.distributed import join
from spark_fast.run.malloc import keep_heap

Part = Literal["sweep", "main", "ablations", "decoder"]


@dataclass
class Options:
    """What is run; the defaults are those of the form."""

    data: Annotated[Path, tyro.conf.arg(help="a tar, or a folder, of class folders in train/ and test/")]
    out: Annotated[Path, tyro.conf.arg(help="where the data are converted, and runs are kept until all are done")]
    form: str
    """cpu (two cores), gpu (one) or smoke (seconds)"""
    networks: tuple[str, ...]
    """functions of learning_networks"""
    epochs: int
    """of pre-training"""
    ablation_epochs: int
    """of pre-training in the ablations and of the decoder's widths"""
    ablation_images: float
    """share of the training images that those see"""
    shares: tuple[float, ...]
    """of the training images that have labels; the first one serves ablations, decoder and sweep"""
    tune_epochs: tuple[int, ...]
    """of fine-tuning, for each share"""
    scratch_lr: tuple[float, ...]
    """learning rate of fine-tuning, for each share, from scratch"""
    pretrained_lr: tuple[float, ...]
    """the same after pre-training"""
    parts: tuple[Part, ...] = ("main", "ablations", "decoder")
    seeds: int = 3
    """fine-tunings of each kind: labelled images, order, crops, the linear layer, and without weights all of them"""
    pretrainings: int = 1
    """of each kind, with seeds of their own, which the fine-tunings share out"""
    batch: int = 128
    """images per step of pre-training"""
    base_lr: float = 4e-3
    """of pre-training, per 256 images"""
    optimizer: Literal["lamb", "adamw"] = "lamb"
    """of pre-training"""
    width: int = 96
    """of the decoder"""
    widths: tuple[int, ...] = (192, 96, 48)
    """of the decoder, to compare"""
    masks: tuple[float, ...] = (0.25, 0.9)
    """shares of masked patches beside 0.6"""
    tune_batch: int = 128
    """images per step of fine-tuning"""
    min_scale: float = 0.5
    """least share of an image that a crop has in fine-tuning"""
    sweep_lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
    """learning rates to try"""
    step_repeats: int = 9
    """steps timed at each width"""
    precision: str = "auto"
    """bf16, fp32 or auto"""
    processes: int = 1
    """runs side by side, which share the CPU's cores: small networks leave cores idle that work on one batch"""
    workers: int = 2
    """decoding threads of a run"""
    write: Path | None = None
    """a page of the docs, into which the table is put between its two marks"""


# what all runs have in common; all else is in the name of each, so that a sweep and what it decides share their runs
SHARED = ("batch", "base_lr", "optimizer", "tune_batch", "min_scale", "precision")
SCRATCH, PRETRAINED = "scratch", "pre-trained"
FORMS: dict[str, dict[str, Any]] = {
    "cpu": {
        "networks": ("small_resnet", "small_convnext"),
        "epochs": 3,
        "ablation_epochs": 1,
        "ablation_images": 0.4,
        "shares": (0.01, 0.1, 1.0),
        "tune_epochs": (30, 5, 1),
        "scratch_lr": (1e-2,) * 3,
        "pretrained_lr": (1e-2,) * 3,
        "precision": "bf16",
        "width": 32,
        "widths": (64, 32, 16),
        "batch": 64,
        "base_lr": 1e-2,
        "optimizer": "adamw",
        "tune_batch": 64,
        "processes": 2,
        "workers": 1,
    },
    "gpu": {
        "networks": ("wide_resnet", "wide_convnext"),
        "epochs": 40,
        "ablation_epochs": 10,
        "ablation_images": 1.0,
        "shares": (0.01, 0.1, 1.0),
        "tune_epochs": (60, 20, 5),
        "scratch_lr": (1e-3,) * 3,
        "pretrained_lr": (1e-3,) * 3,
        "batch": 512,
        "width": 384,
        "widths": (768, 384, 192),
        "workers": 15,
    },
    "smoke": {
        "networks": ("small_convnext",),
        "epochs": 1,
        "ablation_epochs": 1,
        "ablation_images": 1.0,
        "shares": (0.5,),
        "tune_epochs": (1,),
        "scratch_lr": (1e-3,),
        "pretrained_lr": (1e-3,),
        "seeds": 2,
        "batch": 8,
        "width": 8,
        "widths": (16, 8),
        "masks": (0.9,),
        "tune_batch": 4,
        "sweep_lr": (1e-3,),
        "step_repeats": 1,
        "workers": 1,
    },
}  # fmt: skip


class Record:
    """The finished runs, kept line by line; the same settings go on from them.

    Raises:
        SystemExit: they were made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            row = json.loads(line)
            self.rows[row["key"]] = row
        if self.rows.setdefault("settings", {"key": "settings", "made_with": settings})["made_with"] != settings:
            raise SystemExit(f"{path} was made with other settings: take another --out")
        if not lines:
            self._append(self.rows["settings"])

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep the row of a run that is finished."""
        self.rows[key] = {"key": key, **row}
        self._append(self.rows[key])

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def planned(options: Options) -> list[tuple[str, Finetuning]]:
    """Every fine-tuning with its arm; what was pre-trained for it is run before it."""
    plan: list[tuple[str, Finetuning]] = []
    epochs = dict(zip(options.shares, options.tune_epochs, strict=True))
    rates = {
        SCRATCH: dict(zip(options.shares, options.scratch_lr, strict=True)),
        PRETRAINED: dict(zip(options.shares, options.pretrained_lr, strict=True)),
    }

    def add(
        arm: str, network: str, before: Pretraining | None, share: float, lr: float, held_out: bool = False
    ) -> None:
        for seed in range(1 if held_out else options.seeds):
            own = before and dataclasses.replace(before, seed=seed % options.pretrainings)
            plan.append((arm, Finetuning(network, own, share, epochs[share], lr, seed, held_out)))

    for network in options.networks:
        arms = {SCRATCH: None, PRETRAINED: Pretraining(network, options.epochs, options.width)}
        for share in options.shares:
            for arm, before in arms.items():
                if "main" in options.parts:
                    add(arm, network, before, share, rates[arm][share])
                if "sweep" in options.parts and share == options.shares[0]:
                    for lr in options.sweep_lr:
                        add(f"{arm} swept", network, before, share, lr, held_out=True)
    for name, before in changed(options).items():
        share = options.shares[0]
        add(name, before.network, before, share, rates[PRETRAINED][share])
    return plan


def changed(options: Options) -> dict[str, Pretraining]:
    """The pre-trainings of the ablations and of the decoder's widths, by what is changed; the first network alone."""
    short = Pretraining(options.networks[0], options.ablation_epochs, options.width, images=options.ablation_images)
    found: dict[str, Pretraining] = {}
    if {"ablations", "decoder"} & set(options.parts):
        found[PUBLISHED] = short
    if "ablations" in options.parts:
        found |= {name: dataclasses.replace(short, variant=name) for name in VARIANTS}
        found |= {f"mask {mask:g}": dataclasses.replace(short, mask=mask) for mask in options.masks}
    if "decoder" in options.parts:
        found |= {f"decoder {w}": dataclasses.replace(short, width=w) for w in options.widths if w != options.width}
    return found


def run_all(options: Options, bench: Bench, record: Record) -> list[dict[str, Any]]:
    """Run what is not done yet; the rows of the pre-trainings and the fine-tunings."""
    plan = planned(options)
    before_them = dict.fromkeys(run.before for _, run in plan if run.before is not None)
    jobs: dict[str, tuple[float, Callable[[], dict[str, Any]], dict[str, Any]]] = {}
    for before in before_them:
        jobs[before.name] = before.work, partial(bench.pretrain, before), {"run": dataclasses.asdict(before)}
    pretrainings = len(jobs)
    for arm, run in plan:
        about = {"arm": arm, "run": dataclasses.asdict(run)}
        jobs[_key(arm, run)] = run.work, partial(bench.finetune, run), about
    left = {key: work for key, (work, *_) in jobs.items() if key not in record.rows}
    total, begun = sum(left.values()), time.monotonic()
    for phase in (list(jobs)[:pretrainings], list(jobs)[pretrainings:]):
        longest_first = sorted((key for key in phase if key in left), key=lambda key: -left[key])
        for key, row in side_by_side({key: jobs[key][1] for key in longest_first}, options.processes):
            record.add(key, {**jobs[key][2], **row})
            left.pop(key)
            spent, todo = time.monotonic() - begun, sum(left.values())
            to_go = spent * todo / max(total - todo, 1e-9) / 60
            found = f"top-1 {row['top1']:.2f} %" if "top1" in row else f"loss {row['loss']:.4f}"
            print(f"{spent / 60:5.1f} min, about {to_go:.1f} to go  {key}: {found}", flush=True)
    return [record.rows[key] for key in jobs]


def side_by_side(jobs: dict[str, Callable[[], dict[str, Any]]], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each job's key and row as it is finished; with more than one process the cores are shared out to them."""
    if processes == 1:
        yield from ((key, _timed(job)) for key, job in jobs.items())
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (threads,)) as pool:
        running = {pool.submit(_timed, job): key for key, job in jobs.items()}
        try:
            yield from ((running[done], done.result()) for done in as_completed(running))
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_heap()


def _timed(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    begun = time.monotonic()
    return {**job(), "seconds": time.monotonic() - begun}


def _key(arm: str, run: Finetuning) -> str:
    return json.dumps([arm, dataclasses.asdict(run)])


def main(options: Options) -> None:
    """Run, print the table and keep the result."""
    ranks = join("auto")
    if ranks.device.type == "cpu":
        keep_heap()
    settings = {name: getattr(options, name) for name in SHARED}
    record = Record(options.out / "runs.jsonl", settings)
    bench = Bench(Images(options.data, options.out), options.out, ranks.device, options)
    all_runs = run_all(options, bench, record)
    rows = [row for row in all_runs if "top1" in row]
    steps: dict[str, float] = {}
    if "decoder" in options.parts:
        runs = [Pretraining(options.networks[0], 1, width) for width in options.widths]
        if "steps" not in record.rows:
            record.add("steps", _timed(lambda: {"of": bench.seconds_per_step(runs, options.step_repeats)}))
        steps = record.rows["steps"]["of"]
    text = markdown(rows, {int(width): seconds for width, seconds in steps.items()}, options.width)
    print(text)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    result = {
        "settings": {k: v for k, v in vars(options).items() if k not in ("data", "out", "write")},
        "machine": machine(ranks.device, torch.get_num_threads()),
        "versions": versions(("torch", "torchvision", "timm", "numpy")),
        "run_seconds": sum(row["seconds"] for row in all_runs),
        "rows": rows,
        "pretrainings": [row for row in all_runs if "loss" in row],
        "seconds_per_step": steps,
    }
    name = "learning" if options.form != "smoke" else "learning_smoke"
    print(f"kept in {save(name, result)}")
    if options.write:
        put_between_marks(options.write, text)


def parse(argv: list[str]) -> Options:
    """The options, with the form's defaults."""
    form, rest = take_option(argv, "--form")
    form = form or "cpu"
    if form not in FORMS:
        raise SystemExit(f"--form {form}: there are {', '.join(FORMS)}")
    default = Options(data=tyro.MISSING, out=tyro.MISSING, form=form, **FORMS[form])
    return tyro.cli(Options, args=rest, default=default, description=__doc__, use_underscores=True)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
