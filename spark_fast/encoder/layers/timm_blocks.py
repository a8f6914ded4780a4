"""Blocks of timm that mix positions in their own `forward`, where no layer shows it: written again.

Each computes what timm's does, its mean over height and width being one over the visible cells of the image. The
one text serves packed patches, masked maps and dense maps alike; the layers inside are converted as everywhere,
but for `inside`, which see one value per image.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spark_fast.encoder.context import EncoderContext


class Block:
    """Mixin: what `spark_fast.encoder.convert_network` needs to know of a block."""

    context: EncoderContext
    inside: tuple[str, ...] = ()  # children that see one value per image: left as they are
    padded: ClassVar[
        dict[str, tuple[int, int, int, int]]
    ] = {}  # layers that take over (left, right, top, bottom) padding


class SplitAttention(Block):
    """ResNeSt's split attention (timm.layers.SplitAttn): a softmax over `radix` branches per image."""

    inside = ("fc1", "bn1", "act1", "fc2", "rsoftmax")

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h/stride, w/stride)."""
        x = self.act0(self.drop(self.bn0(self.conv(x))))
        splits = x.unflatten(1, (self.radix, -1))
        weights = self.context.per_image(splits.sum(1), self._weights)  # (N, radix*C', 1, 1)
        return (splits * weights.unflatten(1, (self.radix, -1))).sum(1).contiguous()

    def _weights(self: Any, images: Tensor) -> Tensor:
        reduced = self.act1(self.bn1(self.fc1(images.mean((2, 3), keepdim=True))))
        return self.rsoftmax(self.fc2(reduced)).view(len(images), -1, 1, 1)


class KernelSelection(Block):
    """SKNet's weights of its paths (timm.layers.SelectiveKernelAttn): a softmax over paths per image."""

    inside = ("fc_reduce", "bn", "act", "fc_select")

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, paths, C, h, w) -> (N, paths, C, 1, 1)."""
        weights = self.context.per_image(x.sum(1), self._weights)
        return weights.unflatten(1, (self.num_paths, -1)).softmax(1)

    def _weights(self: Any, images: Tensor) -> Tensor:
        return self.fc_select(self.act(self.bn(self.fc_reduce(images.mean((2, 3), keepdim=True)))))


class FocalModulation(Block):
    """FocalNet's modulation (timm.models.focalnet): depthwise contexts of growing reach, the last one global."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, h, w), the same shape comes back."""
        query, context, gates = self.f(x).split(self.input_split, 1)
        modulator = 0
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            modulator = modulator + context * gates[:, level : level + 1]
        modulator = modulator + self.act(self.context.image_mean(context)) * gates[:, self.focal_level :]
        if self.normalize_modulator:
            modulator = modulator / (self.focal_level + 1)
        return self.proj_drop(self.proj(self.norm(query * self.h(modulator))))


class ConditionalResidual(Block):
    """EfficientNet's conditional convolution block (CondConvResidual): kernels mixed per image."""

    inside = ("routing_fn",)

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h/stride, w/stride)."""
        routing = self.context.per_image(x, self._routing)  # (N, experts, 1, 1)
        out = self.bn1(self.conv_pw(x, routing))
        out = self.se(self.bn2(self.conv_dw(out, routing)))
        out = self.bn3(self.conv_pwl(out, routing))
        return self.drop_path(out) + x if self.has_skip else out

    def _routing(self: Any, images: Tensor) -> Tensor:
        return torch.sigmoid(self.routing_fn(images.mean((2, 3))))[:, :, None, None]


class ConditionalConv(Block):
    """A convolution whose kernel is mixed per image (timm.layers.CondConv2d): on the dense map."""

    def forward(self: Any, x: Tensor, routing: Tensor) -> Tensor:
        """x as packed or masked, routing (N, experts, 1, 1)."""
        seen = self.context.visible
        if seen is None:
            return super().forward(x, routing.flatten(1))  # type: ignore[misc]
        if self.context.dense:
            return super().forward(x.masked_fill(~seen.cells(x.shape[2]), 0.0), routing.flatten(1))  # type: ignore[misc]
        per_image = routing[:: seen.per_image].flatten(1)
        return seen.pack(super().forward(seen.unpack(x), per_image))  # type: ignore[misc]


class PaddedStem(Block):
    """The stem of PP-HGNetV2 (timm.models.hgnet.StemV2), which pads right and below before 2x2 layers."""

    padded: ClassVar = dict.fromkeys(("stem2a.conv", "stem2b.conv", "pool"), (0, 1, 0, 1))

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, 3, h, w) -> (N, C, h/4, w/4)."""
        dense = self.context.visible is None
        pad = (lambda t: F.pad(t, (0, 1, 0, 1))) if dense else (lambda t: t)
        x = pad(self.stem1(x))
        x = torch.cat([self.pool(x), self.stem2b(pad(self.stem2a(x)))], 1)
        return self.stem4(self.stem3(x))
