"""LayerNorm over the channels of each cell, by the GPU kernel under autocast."""

from __future__ import annotations

import timm.layers as tl
import torch
from torch import Tensor

from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.layers.converted import ConvertedLayer


class ChannelNorm(ConvertedLayer):
    """Mixin: a LayerNorm over the last dimension, or over the channels of maps (timm's LayerNorm2d).

    Autocast computes it in fp32 and returns fp32, from cells and for a matrix product in bf16. The kernel casts in its
    registers instead. Its values are PyTorch's to fp32 rounding.

    Attributes:
        rounded: only a convolution or linear layer reads the output. Autocast would round it there, so the kernel does.
    """

    rounded = False
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., C), or (N, C, h, w) for a LayerNorm2d; the same shape comes back."""
        own = len(self.normalized_shape) > 1 or getattr(self, "_fast_norm", False)  # timm's switch: bf16 throughout
        if own or not gpu.use_fused(self.context.kernels, x):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(x.device.type) if self.rounded else torch.float32
        maps = isinstance(self, tl.LayerNorm2d)
        out = gpu.layer_norm(x.permute(0, 2, 3, 1) if maps else x, self.weight, self.bias, self.eps, dtype)
        return out.permute(0, 3, 1, 2) if maps else out
