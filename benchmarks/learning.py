"""Does pre-training pay? Fine-tuned with few labels and with all, against the same network from scratch, on CIFAR-10.

    python benchmarks/learning.py --form cpu --data cifar10.tar.gz --out /tmp/learning
    python benchmarks/learning.py --form gpu --data cifar10.tar.gz --out /tmp/learning
    python benchmarks/learning.py --form evidence --data cifar10.tar.gz --out /tmp/evidence

64 px, patches of 8 px. Parts: `main`, each network and share of labels; `ablations`, the choices of the paper undone
one at a time; `decoder`, its width, with the seconds of a step; `sweep`, the learning rates of both arms, judged by
training images that are held out; `evidence`, the choices of the paper and FCMAE with three pre-trainings of each, see
`learning_plan`. Every run that is finished is a line of OUT/runs.jsonl, and a pre-training under way has checkpoints,
so the same command goes on. The forms `evidence` and `evidence_gpu` have the last part alone.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import learning_plan
import learning_report
import torch
from learning_forms import SHARED, Options, parse
from learning_images import Images
from learning_methods import PUBLISHED, VARIANTS, Finetuning, Pretraining
from learning_plan import SCRATCH, STEPS, Job, Rows, finetuning_job
from learning_queue import Record, run_ready
from learning_runs import Bench
from learning_table import MARKS, markdown, put_between_marks
from measuring import machine, save, versions

from spark_fast.run.distributed import join
from spark_fast.run.malloc import keep_heap

PRETRAINED = "pre-trained"


def planned(options: Options) -> list[tuple[str, Finetuning]]:
    """Every fine-tuning with its arm; what was pre-trained for it is run before it."""
    plan: list[tuple[str, Finetuning]] = []
    if {*options.parts} <= {"evidence"}:
        return plan
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


def ready(options: Options, rows: Rows) -> Iterator[Job]:
    """The runs of all parts that are done or can be begun now, in the order in which they are begun."""
    if "evidence" in options.parts:
        yield from learning_plan.plan(options, rows)
    finetunings = sorted(planned(options), key=lambda item: -item[1].work)
    pretrainings = dict.fromkeys(run.before for _, run in finetunings if run.before is not None)
    for before in sorted(pretrainings, key=lambda run: -run.work):
        yield Job(before.name, "pretrain", before, {"run": dataclasses.asdict(before)})
    if all(before.name in rows for before in pretrainings):
        for arm, run in finetunings:
            yield finetuning_job(arm, run)


def run_all(options: Options, bench: Bench, record: Record) -> list[dict[str, Any]]:
    """Run what is not done yet; the rows of all runs that are finished."""
    begun = time.monotonic()

    def left() -> list[Job]:
        return [job for job in ready(options, record.rows) if job.key not in record.rows]

    for job, row in run_ready(left, bench.do, options.processes, 60 * options.minutes or math.inf):
        record.add(job.key, {**job.about, **row})
        found = ", ".join(f"{name} {row[name]:.4g}" for name in ("loss", "top1") if name in row)
        spent = (time.monotonic() - begun) / 60
        print(f"{spent:5.1f} min, {len(record.rows) - 1} of {total(options)} runs  {job.key}: {found}", flush=True)
    return [record.rows[job.key] for job in ready(options, record.rows) if job.key in record.rows]


def total(options: Options) -> int:
    """How many runs there are in all."""
    runs = [run for _, run in planned(options)]
    others = learning_plan.expected(options) if "evidence" in options.parts else 0
    return len(runs) + len({run.before for run in runs} - {None}) + others


def main(options: Options) -> None:
    """Run, print the table and keep the result."""
    ranks = join("auto")
    if ranks.device.type == "cpu":
        keep_heap()
    settings = {name: getattr(options, name) for name in SHARED}
    record = Record(options.out / "runs.jsonl", settings)
    images = Images(options.data, options.out, options.channels)
    if "evidence" in options.parts:
        images.link_neighbours(options.neighbours)
    bench = Bench(images, options.out, ranks.device, options)
    bench.decode()
    all_runs = run_all(options, bench, record)
    rows = [row for row in all_runs if "top1" in row]
    steps: dict[str, float] = {}
    if "decoder" in options.parts:
        runs = {str(width): Pretraining(options.networks[0], 1, width) for width in options.widths}
        if "steps" not in record.rows:
            record.add("steps", {"of": bench.seconds_per_step(runs, options.step_repeats)})
        steps = record.rows["steps"]["of"]
    others = [row for row in rows if row["key"] in {finetuning_job(*item).key for item in planned(options)}]
    text = markdown(others, {int(width): seconds for width, seconds in steps.items()}, options.width)
    if "evidence" in options.parts:
        steps = record.rows.get(STEPS, {}).get("of", {})
        text += learning_report.markdown(options, record.rows)
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
    name = "learning" if options.form in ("cpu", "gpu") else f"learning_{options.form}"
    print(f"kept in {save(name, result)}")
    if options.write:
        evidence_alone = set(options.parts) == {"evidence"}
        put_between_marks(options.write, text, learning_report.marks(options.form) if evidence_alone else MARKS)


if __name__ == "__main__":
    main(parse(sys.argv[1:], __doc__))
