"""True submanifold convolutions by facebookresearch/SparseConvNet, for those who ask for them (`--sparse_conv=1`).

A submanifold convolution keeps a list of active cells, one row of C channels each, and computes outputs for these
alone. The packed tensor (V, C, b, b) is such a list: V*b*b rows. So every layer that SparseConvNet can do (ungrouped,
stride 1, undilated, an odd kernel above 1x1 padded to the same size) hands it these, the others stay packed.

Which cells are active follows from the mask, never from the features: a visible cell may well be zero. SparseConvNet
keeps them, and the neighbours of each (a *rulebook*), in a Metadata object, one per step and resolution.

It is here because it is asked for, not because it is fast. It computes in float32: autocast is off inside, and float64
is computed as in the packed encoder. It makes rulebooks on the CPU, so that a GPU waits, and `torch.compile` breaks its
graph.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext
from spark_fast.encoder import PackedEncoder
from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.convert_network import PACKED, LayerTable
from spark_fast.encoder.layers.halo import HaloConv
from spark_fast.encoder.visible import VisiblePatches

INSTALL = """\
    git clone https://github.com/facebookresearch/SparseConvNet && cd SparseConvNet
    sed -i 's/-std=c++17/-std=c++20/g' setup.py
    pip install -U setuptools wheel ninja pillow
    pip install --no-build-isolation --no-deps ."""


class SparseConvNetError(ValueError):
    """SparseConvNet cannot be used here; the message says why, and how to install it."""


def require() -> ModuleType:
    """The module `sparseconvnet`; raises SparseConvNetError where it is missing or was built for another torch."""
    try:
        return importlib.import_module("sparseconvnet")
    except ImportError as error:
        raise SparseConvNetError(
            f"SparseConvNet cannot be imported ({error}). It is on no package index: build it for your torch:\n"
            f"{INSTALL}\nor use --encoder packed, which computes the same features"
        ) from error


def sites(visible: VisiblePatches, b: int) -> tuple[Tensor, object]:
    """Height and width of the map, (2,) int64, and the Metadata of its visible cells, in the order of the packed rows.

    b x b cells per patch. Raises SparseConvNetError: see `require`; or it was built without CUDA.
    """

    def make() -> tuple[Tensor, object]:
        scn, (h, w) = require(), visible.grid
        if visible.index.is_cuda and not scn.SCN.is_cuda_build():  # it would take the pointers for host memory
            raise SparseConvNetError(f"SparseConvNet was built without CUDA; build it where a GPU is:\n{INSTALL}")
        patches, cell = visible.patches.cpu().view(-1, 1, 1), torch.arange(b)
        image, y, x = patches // (h * w), patches // w % h * b + cell[:, None], patches % w * b + cell
        cells = torch.stack(torch.broadcast_tensors(image, y, x), -1).view(-1, 3)  # (V*b*b, 3)
        size, metadata = torch.tensor([h * b, w * b]), scn.Metadata(2)
        metadata.createMetadataForDenseToSparse(size, cells, visible.batch)
        return size, metadata

    return visible.cached_table(("sites", b), make)


class _SubmanifoldContext(AutogradContext, Protocol):
    where: tuple[Tensor, Tensor, object]


class _Submanifold(torch.autograd.Function):
    """rows (n, C) and kernel (k*k, 1, C, O), float32 -> (n, O); `where` is (map size, kernel size, Metadata)."""

    @staticmethod
    def forward(rows: Tensor, kernel: Tensor, where: tuple) -> Tensor:
        out, no_bias = rows.new_empty(0), rows.new_empty(0)  # its CUDA code for a bias looks wrong
        with torch.autocast(rows.device.type, enabled=False):
            require().SCN.SubmanifoldConvolution_updateOutput(*where, rows, out, kernel, no_bias)
        return out

    @staticmethod
    def setup_context(ctx: _SubmanifoldContext, inputs: tuple, output: Tensor) -> None:
        *saved, ctx.where = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: _SubmanifoldContext, grad: Tensor) -> tuple:
        (rows, kernel), no_bias, grad = ctx.saved_tensors, grad.new_empty(0), grad.contiguous()
        to_rows, to_kernel = torch.zeros_like(rows), torch.zeros_like(kernel)
        with torch.autocast(rows.device.type, enabled=False):
            require().SCN.SubmanifoldConvolution_backward(*ctx.where, rows, to_rows, grad, kernel, to_kernel, no_bias)
        return to_rows, to_kernel, None


@torch.compiler.disable
def submanifold(x: Tensor, weight: Tensor, bias: Tensor | None, visible: VisiblePatches) -> Tensor:
    """(V, C, b, b) and a torch weight (O, C, k, k) -> (V, O, b, b), in the dtype of x or of autocast."""
    (o, c, k, _), b, device = weight.shape, x.shape[2], x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.permute(0, 2, 3, 1).reshape(-1, c).float().contiguous()  # (V*b*b, C)
    kernel = weight.float().permute(2, 3, 1, 0).reshape(k * k, 1, c, o).contiguous()  # (k*k, 1, C, O)
    size, metadata = sites(visible, b)
    out = _Submanifold.apply(rows, kernel, (size, torch.tensor([k, k]), metadata))
    out = out if bias is None else out + bias
    return out.to(dtype).view(-1, b, b, o).permute(0, 3, 1, 2)


class SparseConv(HaloConv):
    """A convolution of packed patches, by SparseConvNet where it can."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, O, b/stride, b/stride); on a dense map while no patches are visible."""
        visible = self.context.visible
        unfit = x.dtype == torch.float64 or x.is_meta  # in tracing there are shapes alone
        if visible is None or unfit or not self.can_be_submanifold(x.shape[2]):
            return super().forward(x)
        return submanifold(x, self.kernel(), self.bias, visible)

    def extra_repr(self) -> str:
        """As the packed layer's, which is what float64 takes, and whether SparseConvNet computes it."""
        return super().extra_repr() + (", sparseconvnet" if self.cells and self.can_be_submanifold(self.cells) else "")

    def can_be_submanifold(self, b: int) -> bool:
        """Can SparseConvNet compute this layer?"""
        y, x = self.checked_axes(b)
        k = y.kernel
        return self.groups == 1 and k > 1 and k % 2 == 1 and y == x == Axis(k, 1, 1, k // 2, k // 2)


SPARSE: LayerTable = {**PACKED, "conv": SparseConv}


class SparseEncoder(PackedEncoder):
    """The packed encoder with SparseConvNet's convolutions; raises SparseConvNetError where that is missing."""

    table = SPARSE

    def __init__(self, *args: Any, **options: Any) -> None:  # those of every encoder
        require()
        super().__init__(*args, **options)
