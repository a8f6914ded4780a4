"""timm's residual blocks of ResNets, each norm computed together with what comes after it (`normalize`).

A norm cannot see the sum and the activation behind it: they stand in the block's `forward`, which is written again here
for packed patches and where the kernels of batch norms run. Everywhere else timm's own runs.
"""

from __future__ import annotations

from torch import Tensor, nn

from spark_fast.encoder.conv.kernels import use_kernels
from spark_fast.encoder.layers.batch_norm import normalize
from spark_fast.encoder.layers.timm_blocks import Block


class ResidualBlock(Block):
    """Base of both: the last convolution's norm, the shortcut, the last activation."""

    conv1: nn.Module
    conv2: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    act1: nn.Module
    act2: nn.Module
    drop_block: nn.Module
    aa: nn.Module
    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C', b/stride, b/stride)."""
        if self.context.visible is None or self.context.dense or not use_kernels(self.context.kernels, x):
            return super().forward(x)
        return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _dropped(self, norm: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
        """A norm, the block's dropping of regions, an activation."""
        kernels = self.context.kernels
        if type(self.drop_block) is nn.Identity:
            return normalize(norm, activation, x, None, kernels)
        return activation(self.drop_block(norm(x)))

    def _last(self, norm: nn.Module, activation: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
        """The norm of what the convolutions give, plus the shortcut, activated."""
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if self.se is None and self.drop_path is None:
            return normalize(norm, activation, x, shortcut, self.context.kernels)
        x = norm(x)
        for layer in (self.se, self.drop_path):
            x = x if layer is None else layer(x)
        x += shortcut
        return activation(x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (timm.models.resnet.BasicBlock)."""

    def _fused(self, x: Tensor) -> Tensor:
        hidden = self.aa(self._dropped(self.bn1, self.act1, self.conv1(x)))
        return self._last(self.bn2, self.act2, self.conv2(hidden), x)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions (timm.models.resnet.Bottleneck)."""

    conv3: nn.Module
    bn3: nn.Module
    act3: nn.Module

    def _fused(self, x: Tensor) -> Tensor:
        hidden = normalize(self.bn1, self.act1, self.conv1(x), None, self.context.kernels)
        hidden = self.aa(self._dropped(self.bn2, self.act2, self.conv2(hidden)))
        return self._last(self.bn3, self.act3, self.conv3(hidden), x)
