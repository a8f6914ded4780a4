"""What the parts of `device_report` are made of: jobs, each a row, at the scale of a GPU or of a rehearsal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ways import Shape


class NotHereError(Exception):
    """This job cannot be done here, and why."""


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    name: str
    run: Callable[[], dict[str, Any]]
    needs: float  # seconds, roughly


class ConvLayer(NamedTuple):
    """A square convolution of packed patches of b x b cells, padded by half its kernel."""

    kernel: int
    stride: int
    channels: int
    b: int
    depthwise: bool = False


@dataclass(frozen=True)
class Scale:
    """How large everything is: `FULL` on a GPU, `TINY` to rehearse."""

    step_shapes: tuple[Shape, ...]
    fcmae: Shape
    encoder: Shape
    masks: tuple[float, ...]
    layers: tuple[ConvLayer, ...]
    norms: tuple[tuple[int, int], ...]  # channels, cells per patch side
    seeds: int
    images: int
    workers: int
    repeats: int
    copy_mib: int
    compile: bool


FULL = Scale(
    step_shapes=(
        Shape("resnet50", 224, 0.6, 256),
        Shape("convnext_small", 224, 0.6, 128),
        Shape("convnext_large", 224, 0.6, 64),
        Shape("convnext_large", 384, 0.75, 32),
    ),
    fcmae=Shape("convnextv2_tiny", 224, 0.6, 128, method="fcmae"),
    encoder=Shape("resnet50", 224, 0.6, 256),
    masks=(0.0, 0.4, 0.6, 0.75),
    layers=(
        # of ResNet-50
        *(ConvLayer(3, 1, 64 * 8 // b, b) for b in (8, 4, 2, 1)),
        *(ConvLayer(3, 2, 128 * 8 // b, b) for b in (8, 4, 2)),
        # of ConvNeXt-S
        *(ConvLayer(7, 1, 96 * 8 // b, b, depthwise=True) for b in (8, 4, 2, 1)),
    ),
    norms=((64, 16), (256, 8), (512, 4), (1024, 2), (2048, 1), (64, 8), (128, 4), (256, 2), (512, 1)),  # of ResNet-50
    seeds=9,
    images=1024,
    workers=16,
    repeats=7,
    copy_mib=1024,
    compile=True,
)
TINY = Scale(
    step_shapes=(Shape("resnet10t", 64, 0.5, 4, 32), Shape("convnext_atto", 64, 0.5, 4, 32)),
    fcmae=Shape("convnextv2_atto", 64, 0.5, 4, 32, "fcmae"),
    encoder=Shape("resnet10t", 64, 0.5, 4, 32),
    masks=(0.0, 0.5),
    layers=(ConvLayer(3, 1, 8, 4), ConvLayer(7, 1, 8, 2, depthwise=True)),
    norms=((8, 4), (8, 2)),
    seeds=3,
    images=16,
    workers=1,
    repeats=2,
    copy_mib=8,
    compile=False,
)
