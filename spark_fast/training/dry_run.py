"""`--dry_run`: what a run would cost, measured in two of its steps; nothing is written to the disk.

The first step warms up (allocation, algorithms, compilation), the second is measured; so times are rough, sizes exact.
"""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from itertools import count, islice

from spark_fast.checkpoint.file import tensor_bytes
from spark_fast.checkpoint.manager import CHECKPOINT
from spark_fast.reporting.mfu import peak_memory
from spark_fast.training.pretrain_run import PretrainRun

STEPS = 2


def print_estimate(run: PretrainRun) -> None:
    """Take two steps on every rank, and print what the run would cost on the first."""
    to_go = run.position.total_steps - run.position.step
    figures = rehearse(run, STEPS)
    if run.ranks.main:
        print(estimate_text(run, figures, to_go), flush=True)


def rehearse(run: PretrainRun, steps: int) -> dict[str, float]:
    """Take a few steps and write nothing; returns the figures of the last one alone (`Monitor.read`)."""
    at, monitor, means = run.position, run.monitor(run.logger(None)), {}
    with closing(b for epoch in count(at.epoch) for b in run.pipeline.epoch(epoch)) as batches:
        for batch in islice(monitor.timed(batches), steps):
            monitor.clock.read()
            loss, norm = run.step(at.step, batch)
            at.step += 1
            monitor.add(at.step, loss, norm, batch.ids)
            means = monitor.read()
    return means


def estimate_text(run: PretrainRun, figures: dict[str, float], to_go: int) -> str:
    """What a run would cost, as text.

    Args:
        figures: of one step, from `rehearse`.
        to_go: steps of the run that are still to do.
    """
    model, cost, device = run.model, run.mfu.cost, run.ranks.device
    encoder = sum(p.numel() for p in model.encoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    phases = ", ".join(f"{name} {figures[name + '_seconds']:.3g}" for name in ("data", "forward", "backward"))
    where = "of the device" if device.type == "cuda" else "of the process"
    checkpoint = tensor_bytes([model.state_dict(), run.optimizer.state_dict()])
    rows = {
        "encoder": f"{encoder / 1e6:.1f} M parameters, {cost.encoder / 1e9:.3g} GMACs per image on its visible patches "
        f"({cost.whole / 1e9:.3g} on a whole one)",
        "decoder": f"{(everything - encoder) / 1e6:.1f} M parameters, {cost.decoder / 1e9:.3g} GMACs per image",
        "memory": f"{peak_memory(device) / 2**30:.2f} GiB {where} at most",
        "step": f"{figures['step_seconds']:.3g} s ({phases}, optimizer {figures['optimizer_seconds']:.3g}), "
        f"{figures['images_per_second']:.1f} images/s, MFU {figures['mfu']:.1%}, loss {figures['loss']:.4f}",
        "run": f"{to_go} steps to go, {run.position.steps_per_epoch} per epoch: "
        f"{timedelta(seconds=round(to_go * figures['step_seconds']))} at this pace",
        "checkpoint": f"{checkpoint / 2**20:.0f} MiB each, {run.settings.folder / CHECKPOINT}",
    }
    if run.evaluator is not None:
        rows["evaluation"] = f"{run.evaluator.about}; its time is not in that of the run"
    return "\n".join(["dry run: nothing was written", *(f"  {name:<11} {text}" for name, text in rows.items())])
