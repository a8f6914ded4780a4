"""Is the packed encoder the masked one? Loss and gradient of both, beside the masked encoder in float64.

Where an input of a ReLU is nearly 0, the rounding of one encoder may pass it and that of the other not. A single such
flip changes the gradient a thousand times as much as all other rounding, of whichever encoder has it: at six seeds
packed was 1.00, 1.07, 1.00, 744, 0.84 and 1.00 times as far off as masked (ResNet-50, 64 px, batch 8, fp32, on a CPU),
and 1.07, 0.86, 0.99, 1.09, 0.0001 and 0.75 times with ConvNeXt-S. So one seed may say anything: the median judges.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from device_jobs import Job, Scale
from torch import Tensor
from ways import Shape, Way, build, inputs, tf32

from spark_fast.method import Method

WAYS = {"exact": Way("masked"), "masked": Way("masked"), "packed": Way("packed", kernels=None)}
ROUNDING = {"fp32": 1e-5, "bf16": 2e-3}  # below it chance decides which encoder is nearer


def equality_jobs(scale: Scale, device: torch.device) -> Iterator[Job]:
    """A row for each network and precision."""
    for shape in {s.model: s for s in scale.step_shapes}.values():
        for precision in ("fp32", "bf16"):
            small = replace(shape, batch=min(4, shape.batch))
            yield Job(f"{shape.model} {precision}", partial(equality, small, precision, scale.seeds, device), 10)


def equality(shape: Shape, precision: str, seeds: int, device: torch.device) -> dict[str, Any]:
    """How far loss and gradient of either encoder are from the exact ones, relatively: medians over the seeds.

    "ratio" is the median of how much further off packed is than masked at the same seed.

    Raises:
        AssertionError: a ratio above 2.
    """
    row: dict[str, Any] = {"batch": shape.batch, "seeds": seeds}
    off = distances(shape, precision, seeds, device)
    for what in ("loss", "gradient"):
        masked, packed = off["masked", what], off["packed", what]
        row[f"masked {what} off by"], row[f"packed {what} off by"] = (
            statistics.median(masked),
            statistics.median(packed),
        )
        row[f"{what} ratio"] = statistics.median(
            p / (m + ROUNDING[precision] / 2) for p, m in zip(packed, masked, strict=True)
        )
        if not row[f"{what} ratio"] <= 2:
            raise AssertionError(f"the packed {what} is further off than the masked one: {row}, seed by seed {off}")
    return row


def distances(shape: Shape, precision: str, seeds: int, device: torch.device) -> dict[tuple[str, str], list[float]]:
    """(encoder, loss or gradient) -> how far it is from the exact one, relatively, at each seed."""
    off: dict[tuple[str, str], list[float]] = {(e, w): [] for e in ("masked", "packed") for w in ("loss", "gradient")}
    models = {name: build(way, shape, device) for name, way in WAYS.items()}
    models["exact"].double()
    with tf32(False):
        for seed in range(seeds):
            results = {
                name: _loss_and_gradient(model, shape, seed, None if name == "exact" else precision, device)
                for name, model in models.items()
            }
            loss, gradient = results.pop("exact")
            for encoder, (its_loss, its_gradient) in results.items():
                off[encoder, "loss"].append(abs(its_loss - loss) / loss)
                off[encoder, "gradient"].append(float((its_gradient - gradient).norm() / gradient.norm()))
    return off


def _loss_and_gradient(
    model: Method, shape: Shape, seed: int, precision: str | None, device: torch.device
) -> tuple[float, Tensor]:
    """Of the encoder, in float64; None computes in it, too. Layers that begin as good as absent are given weight."""
    images, seen = inputs(model, shape, Way(), device, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.encoder.parameters():
        if parameter.dim() == 1:  # norms that begin at 0, layer scales that begin at 1e-6
            values = torch.rand(parameter.shape, generator=generator) * 0.5 + 0.5
            parameter.data.copy_(values)
    model.zero_grad()
    if precision is None:
        images = images.double()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images, seen)
    loss.backward()
    gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat([g.double().flatten() for g in gradients])
