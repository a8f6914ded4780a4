"""The light UNet decoder of SparK: dense, one block for each factor of two, levels added on the way up.

Structure and initialisation are those of the published code (pretrain/decoder.py), with its parameter names.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn

from spark_fast.autograd import AutogradContext
from spark_fast.decoder.upsample import merging_pays, upsample, upsample_and_convolve
from spark_fast.encoder.layers.batch_norm import ACTIVATIONS, normalize, projected


class ReLU6(nn.ReLU6):
    """In place; saves its output for backward. torch's own saves its input, and so copies what it then overwrites."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape; the output is the input's memory."""
        return _ReLU6.apply(x)


ACTIVATIONS[ReLU6] = "relu6"  # fused with the norm before it, as torch's own


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        x.clamp_(0, 6)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], y, 0, 6)  # 0 at and beyond both limits, which y shows too


class UNetBlock(nn.Module):
    """Twice the resolution: (B, cin, h, w) -> (B, cout, 2h, 2w).

    Attributes:
        merge: compute the first two layers as one (`upsample_and_convolve`); False: each by itself, by torch; None,
            the default: as one where that pays.
    """

    merge: bool | None = None

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(cin, cin, kernel_size=4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(cin, cin, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(cin),
            ReLU6(inplace=True),
            nn.Conv2d(cin, cout, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
        )

    def forward(
        self, x: Tensor, level: Tensor | None = None, kernels: bool | None = None, project: nn.Conv2d | None = None
    ) -> Tensor:
        """(B, cin, h, w) -> (B, cout, 2h, 2w), plus `level`, of that shape; then `project`, a convolution to pixels.

        `kernels` as `spark_fast.encoder.conv.kernels.use_kernels` takes it: whether they compute the norms.
        """
        up, (convolve, norm, activation, narrow, last) = self.up_sample, self.conv
        assert isinstance(convolve, nn.Conv2d)
        assert up.bias is not None
        if self.merge is False:
            x = convolve(up(x))
        elif self.merge or merging_pays(x, up.out_channels):
            centred = x.is_cuda and norm.training  # elsewhere the sum costs little, and keeps its bits
            x = upsample_and_convolve(x, up.weight, up.bias, convolve.weight, centred)
        else:
            x = convolve(upsample(x, up.weight, up.bias))
        x = narrow(normalize(norm, activation, x, None, kernels))
        if project is not None and level is None:
            pixels = projected(last, project, x, kernels)
            if pixels is not None:
                return pixels
        y = normalize(last, None, x, level, kernels)
        return y if project is None else project(y)


class Decoder(nn.Module):
    """From the densified pyramid to pixels.

    Args:
        patch: the total stride, a power of two; log2(patch) blocks.
        width: channels of the coarsest level; block i has width // 2^i, rounded down as in the published code.
        out_chans: of the pixels, as many as the images'.

    Raises:
        ValueError: `patch` is no power of two, or `width` is less than `patch`, so that a block would have no channel.
    """

    def __init__(self, patch: int, width: int = 768, out_chans: int = 3) -> None:
        super().__init__()
        blocks = patch.bit_length() - 1
        if patch != 2**blocks:
            raise ValueError(f"the decoder needs a total stride that is a power of two, got {patch}")
        if width < patch:
            raise ValueError(
                f"decoder_width {width} is too small: it is halved {blocks} times, so the smallest is {patch}"
            )
        widths = [width // 2**i for i in range(blocks + 1)]
        self.dec = nn.ModuleList(UNetBlock(cin, cout) for cin, cout in pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], out_chans, kernel_size=1)
        self.apply(_initialize)

    def forward(self, levels: list[Tensor], kernels: bool | None = None) -> Tensor:
        """Levels coarsest first, (B, width // 2^i, h * 2^i, w * 2^i) -> (B, C, H, W); `kernels` as in `UNetBlock`."""
        x, added = levels[0], levels[1 : len(self.dec)]
        for block, level in zip_longest(self.dec, added):
            x = block(x, level, kernels, self.proj if block is self.dec[-1] else None)
        return x


def _initialize(module: nn.Module) -> None:
    """As published. ConvTranspose2d is no subclass of Conv2d, so its Kaiming branch does apply."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
