"""Reimplementations of timm blocks whose `forward` mixes positions outside any submodule.

Each computes what timm's does, with means over height and width taken over the visible cells of the image. The same
code serves packed patches, masked maps and dense maps: (N, C, h, w) is any of them. The layers inside a block are
converted as everywhere, but for those in `inside`, which see one value per image.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.encoder.layers.converted import ConvertedLayer


class Block(ConvertedLayer):
    """Base of the mixins.

    Attributes:
        inside: children that see one value per image, and are left as they are.
        padded: layers by path, and the (left, right, top, bottom) padding that each takes over from `forward`.
    """

    inside: ClassVar[tuple[str, ...]] = ()
    padded: ClassVar[dict[str, tuple[int, int, int, int]]] = {}


class SplitAttention(Block):
    """ResNeSt's split attention (timm.layers.SplitAttn): a softmax over `radix` branches per image."""

    inside = ("fc1", "bn1", "act1", "fc2", "rsoftmax")
    conv: nn.Module
    bn0: nn.Module
    drop: nn.Module
    act0: nn.Module
    fc1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    fc2: nn.Module
    rsoftmax: nn.Module
    radix: int

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h/stride, w/stride)."""
        x = self.act0(self.drop(self.bn0(self.conv(x))))
        splits = x.unflatten(1, (self.radix, -1))
        weights = self.context.reduce_images(splits.sum(1), self._weights)  # (N, radix*C', 1, 1)
        return (splits * weights.unflatten(1, (self.radix, -1))).sum(1).contiguous()

    def _weights(self, images: Tensor) -> Tensor:
        reduced = self.act1(self.bn1(self.fc1(images.mean((2, 3), keepdim=True))))
        return self.rsoftmax(self.fc2(reduced)).view(len(images), -1, 1, 1)


class KernelSelection(Block):
    """SKNet's weights of its paths (timm.layers.SelectiveKernelAttn): a softmax over paths per image."""

    inside = ("fc_reduce", "bn", "act", "fc_select")
    fc_reduce: nn.Module
    bn: nn.Module
    act: nn.Module
    fc_select: nn.Module
    num_paths: int

    def forward(self, x: Tensor) -> Tensor:
        """(N, paths, C, h, w) -> (N, paths, C, 1, 1)."""
        weights = self.context.reduce_images(x.sum(1), self._weights)
        return weights.unflatten(1, (self.num_paths, -1)).softmax(1)

    def _weights(self, images: Tensor) -> Tensor:
        return self.fc_select(self.act(self.bn(self.fc_reduce(images.mean((2, 3), keepdim=True)))))


class FocalModulation(Block):
    """FocalNet's modulation (timm.models.focalnet): depthwise contexts of growing reach, the last one global."""

    f: nn.Module
    h: nn.Module
    act: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    focal_layers: nn.ModuleList
    focal_level: int
    input_split: list[int]
    normalize_modulator: bool

    def forward(self, x: Tensor) -> Tensor:
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
    routing_fn: nn.Module
    conv_pw: nn.Module
    bn1: nn.Module
    conv_dw: nn.Module
    bn2: nn.Module
    se: nn.Module
    conv_pwl: nn.Module
    bn3: nn.Module
    drop_path: nn.Module
    has_skip: bool

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h/stride, w/stride)."""
        routing = self.context.reduce_images(x, self._routing)  # (N, experts, 1, 1)
        out = self.bn1(self.conv_pw(x, routing))
        out = self.se(self.bn2(self.conv_dw(out, routing)))
        out = self.bn3(self.conv_pwl(out, routing))
        return self.drop_path(out) + x if self.has_skip else out

    def _routing(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.routing_fn(images.mean((2, 3))))[:, :, None, None]


class ConditionalConv(Block):
    """A convolution whose kernel is mixed per image (timm.layers.CondConv2d): on the dense map."""

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        """x (N, C, h, w), routing (N, experts, 1, 1) -> (N, O, h/stride, w/stride)."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x, routing.flatten(1))
        if self.context.dense:
            return super().forward(x.masked_fill(~visible.cells(x.shape[2]), 0.0), routing.flatten(1))
        per_image = routing[:: visible.num_visible].flatten(1)  # (N, experts) -> (B, experts)
        return visible.pack(super().forward(visible.unpack(x), per_image))


class PaddedStem(Block):
    """The stem of PP-HGNetV2 (timm.models.hgnet.StemV2), which pads right and below before 2x2 layers."""

    padded: ClassVar = dict.fromkeys(("stem2a.conv", "stem2b.conv", "pool"), (0, 1, 0, 1))
    stem1: nn.Module
    stem2a: nn.Module
    stem2b: nn.Module
    pool: nn.Module
    stem3: nn.Module
    stem4: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h/4, w/4)."""
        dense = self.context.visible is None
        pad = (lambda t: F.pad(t, (0, 1, 0, 1))) if dense else (lambda t: t)
        x = pad(self.stem1(x))
        x = torch.cat([self.pool(x), self.stem2b(pad(self.stem2a(x)))], 1)
        return self.stem4(self.stem3(x))
