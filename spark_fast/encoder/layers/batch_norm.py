"""Batch norms by the GPU kernels, together with the sum and the activation after them.

In training on CUDA, one operator computes activation(norm(x) + residual). The map is then written and read fewer times
than by PyTorch's eager code. PyTorch computes all else: evaluation, compiled code (its compiler fuses the same), other
devices and float64, cumulative running statistics (momentum=None).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.layers.converted import ConvertedLayer
from spark_fast.encoder.layers.synced_batch_norm import SYNCED, SyncedBatchNorm2d
from spark_fast.exchange import gathered

TAKEN = (*SYNCED, *SYNCED.values())  # not their subclasses, which compute something else
ACTIVATIONS: dict[type[nn.Module], str] = {nn.Identity: "", nn.ReLU: "relu", nn.ReLU6: "relu6"}

LEAST_ELEMENTS = 0
"""Of a map, from which the kernels are taken, unless they are forced. `benchmarks/device_report.py --only layers`
measures both ways and prints what fits. No GPU has been met yet: by bytes and launches the kernels always win."""
IN_COMPILED_CODE = False
"""Whether compiled code calls the kernels too, instead of what the compiler makes of PyTorch's layers."""


def normalize(
    norm: nn.Module, activation: nn.Module | None, x: Tensor, residual: Tensor | None = None,
    kernels: bool | None = None,
) -> Tensor:  # fmt: skip
    """activation(norm(x) + residual), by the kernels or layer by layer.

    Args:
        norm, activation: the layers; None: no activation.
        x, residual: (N, C, H, W).
        kernels: as `use_kernels` takes it.
    """
    name = "" if activation is None else ACTIVATIONS.get(type(activation))
    fused = None if name is None else by_kernels(norm, x, name, residual, kernels)
    if fused is not None:
        return fused
    x = norm(x)
    if residual is not None:
        x += residual
    return x if activation is None else activation(x)


def by_kernels(
    norm: nn.Module, x: Tensor, activation: str = "", residual: Tensor | None = None, kernels: bool | None = None
) -> Tensor | None:
    """As `normalize`, (N, C, H, W), with an activation of `ACTIVATIONS` by name; None where PyTorch must compute it."""
    if torch.compiler.is_compiling() and not IN_COMPILED_CODE:
        return None
    statistics = _statistics(norm, x, residual, kernels)
    if statistics is None:
        return None
    return gpu.batch_norm_apply(x, residual, *statistics, norm.weight, norm.bias, activation, _synced(norm))


def projected(norm: nn.Module, project: nn.Conv2d, x: Tensor, kernels: bool | None = None) -> Tensor | None:
    """project(norm(x)) for a 1x1 convolution to a few channels, (N, C, H, W) -> (N, O, H, W), as `by_kernels`.

    In compiled code too, where the compiler would write the map between the two layers.
    """
    if (
        project.kernel_size != (1, 1)
        or project.groups > 1
        or project.bias is None
        or norm.weight is None
        or project.in_channels > gpu.MOST_CHANNELS
        or project.out_channels > gpu.MOST_OUTPUTS
        or (statistics := _statistics(norm, x, None, kernels)) is None
    ):
        return None
    weights = norm.weight, norm.bias, project.weight.flatten(1), project.bias
    return gpu.projected_norm(_synced(norm), x, *statistics, *weights)


def _statistics(
    norm: nn.Module, x: Tensor, residual: Tensor | None, kernels: bool | None
) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / sqrt(var + eps), (C,); updates the running statistics. None where PyTorch must compute the norm."""
    if not (isinstance(norm, nn.BatchNorm2d) and norm.training and _fits(norm, x, residual)):
        return None
    if (kernels is None and x.numel() < LEAST_ELEMENTS) or not gpu.use_kernels(kernels, x):
        return None
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    tracked = running if norm.track_running_stats else (None,) * 3
    if _synced(norm):
        every = gathered(gpu.batch_norm_moments(x.detach()))
        return gpu.batch_norm_merge(every, *tracked, x.numel() // x.shape[1], norm.momentum or 0.0, norm.eps)
    return gpu.batch_norm_statistics(x.detach(), *tracked, norm.momentum or 0.0, norm.eps)


def _synced(norm: nn.Module) -> bool:
    """Whether its statistics are those of all ranks."""
    return isinstance(norm, SyncedBatchNorm2d) and norm.synced


def _fits(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels compute what this norm does."""
    own_type = norm.original_type() if isinstance(norm, ConvertedLayer) else type(norm)
    tracked = [t is not None for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    return (
        own_type in TAKEN
        and (all(tracked) and norm.momentum is not None if norm.track_running_stats else True)
        and (norm.weight is None) == (norm.bias is None)
        and x.dim() == 4
        and x.numel() > x.shape[1] > 0  # more than one value of each channel
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
    )


class PackedBatchNorm(ConvertedLayer):
    """Mixin: a norm over the batch of packed patches, whose statistics are those of the visible cells.

    Attributes:
        followed_by: the next activation, where nothing else reads the norm's output. The norm computes it, and
            `Activated` leaves it out. BatchNormAct2d has its own.
    """

    followed_by = ""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b), the same shape comes back."""
        if self.context.visible is None:
            return super().forward(x)
        act, drop = getattr(self, "act", None), getattr(self, "drop", None)
        within = "" if act is None or type(drop) is not nn.Identity else ACTIVATIONS.get(type(act), "")
        y = by_kernels(self, x, within or self.followed_by, None, self.context.kernels)
        if y is None:
            # A patch of one cell has two names for its strides. PyTorch's kernel for CPUs takes four times as long
            # backward where the gradient has the other one than x: it comes with those of a contiguous map.
            return super().forward(x.flatten(1)[:, :, None, None] if x.shape[2:] == (1, 1) else x)
        if self.followed_by:
            self.context.activated = y
        if act is None or within:
            return y
        return act(y if drop is None else drop(y))


class Activated(ConvertedLayer):
    """Mixin: an activation after a norm. It returns its input where the norm has computed the activation already."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape; the output has the same."""
        if self.context.activated is not x:
            return super().forward(x)
        self.context.activated = None
        return x
