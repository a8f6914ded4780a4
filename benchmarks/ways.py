"""The ways to compute a training step that `device_report` compares, from the published one to one CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from measuring import clock
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from spark_fast import method
from spark_fast.decoder import UNetBlock
from spark_fast.encoder import Encoder
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.layers.masked import MaskedNorm
from spark_fast.method import Method
from spark_fast.spark import SparK
from spark_fast.training.optimizers.optim import build_optimizer
from spark_fast.training.schedule import Schedule
from spark_fast.training.step import TrainStep, compiled


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    encoder: str = "packed"
    precision: str = "bf16"
    layout: torch.memory_format = torch.channels_last
    compile: str = "off"
    kernels: bool | None = False  # Triton; False: PyTorch
    graph: bool = False
    plain_decoder: bool = False  # dense projections, no merged layers
    published: bool = False  # that, and every norm of the encoder looks up the visible cells by nonzero

    @property
    def needs_gpu(self) -> bool:
        """Whether a CPU cannot do it."""
        return self.graph or self.kernels is not False


WAYS = {  # in order of importance: eager ones first, since compiling takes as long as all of them
    "packed Triton": Way(kernels=True),
    "published": Way("masked", "fp32", torch.contiguous_format, published=True),
    "packed Triton graph": Way(kernels=True, graph=True),
    "masked": Way("masked"),
    "packed eager": Way(),
    "packed compiled Triton": Way(compile="default", kernels=True),
    "packed compiled Triton graph": Way(compile="default", kernels=True, graph=True),
    "masked compiled": Way("masked", compile="default"),
    "packed compiled": Way(compile="default"),
}


@dataclass(frozen=True)
class Shape:
    """What a step is computed on."""

    model: str
    size: int
    mask: float
    batch: int
    width: int | None = None  # of the decoder, None: the method's own
    method: str = "spark"
    masks: int = 1  # of each image


def build(way: Way, shape: Shape, device: torch.device) -> Method:
    """The model, with the same weights whichever way it is."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if shape.width is None else {"decoder_width": shape.width}
    model = method.build(
        method.method_class(shape.method), shape.model, input_size=shape.size, mask_ratio=shape.mask,
        encoder=way.encoder, check=False, **options,
    )  # fmt: skip
    model.encoder.context.kernels = way.kernels
    if isinstance(model, SparK) and (way.plain_decoder or way.published):
        model.sparse_projections = False
        for block in model.decoder.modules():
            if isinstance(block, UNetBlock):
                block.merge = False
    if way.published:
        _look_up_by_nonzero(model.encoder)
    return model.to(device, memory_format=way.layout).train()  # type: ignore[call-overload]


def inputs(model: Method, shape: Shape, way: Way, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of noise, and their masks."""
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.randn(shape.batch, model.in_chans, shape.size, shape.size, generator=generator, device=device)
    seen = model.sample_masks(seed, 0, torch.arange(shape.batch, device=device), shape.masks)
    return images.contiguous(memory_format=way.layout), seen


def train_step(way: Way, model: Method, device: torch.device, optimizer: str = "") -> TrainStep:
    """The whole step with this optimiser, or the method's, at a rate that leaves the weights about as they are."""
    schedule = Schedule(1e-6, 0, 1000, 0.04, 0.2)
    network, recipe = compiled(model, way.compile), {"optimizer": "lamb", "clip": 5.0, **model.recipe.settings}
    optimizer = optimizer or str(recipe["optimizer"])
    return TrainStep(
        network, build_optimizer(optimizer, model, 0.95), schedule, precision=way.precision, device=device,
        clip=float(recipe["clip"]), cuda_graph=way.graph,
    )  # fmt: skip


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int, warmup: int) -> float:
    """The median time of `run`: on a GPU between CUDA events, so that the host may run ahead as in training."""
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begun = clock(device)
            run()
            times.append(clock(device) - begun)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(events))


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """fp32 products and convolutions in TF32, or not at all; without it torch gives it to convolutions alone."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _look_up_by_nonzero(encoder: Encoder) -> None:
    """Every norm as in the published encoder.py: it looks up the visible cells itself, for which the host waits.

    BatchNorms (`sp_bn_forward`) and LayerNorms (`SparseConvNeXtLayerNorm`) alike: the visible rows are taken out,
    normalised, and put into zeros.
    """
    for norm in encoder.modules():
        rows_of: Callable[[Tensor], Tensor]
        if isinstance(norm, MaskedNorm):
            rows_of = partial(_batch_norm_of_rows, norm)
        elif isinstance(norm, nn.LayerNorm):
            rows_of = partial(nn.LayerNorm.forward, norm)
        else:
            continue
        channels_last = isinstance(norm, nn.LayerNorm) and not isinstance(norm, LayerNorm2d)
        norm.forward = partial(_norm_by_nonzero, norm, rows_of, encoder.context, channels_last)  # type: ignore[method-assign]


def _batch_norm_of_rows(norm: MaskedNorm, rows: Tensor) -> Tensor:
    """(n, C) -> (n, C), by the dense layer of which `norm` was made."""
    return super(MaskedNorm, norm).forward(rows[:, :, None, None]).flatten(1)


def _norm_by_nonzero(
    norm: nn.Module,
    rows_of: Callable[[Tensor], Tensor],
    context: EncoderContext,
    channels_last: bool,
    x: Tensor,
) -> Tensor:
    """(B, H, W, C) for `channels_last`, else (B, C, H, W); the same shape comes back."""
    visible = context.visible
    if visible is None:
        return type(norm).forward(norm, x)
    last = x if channels_last else x.permute(0, 2, 3, 1)
    at = visible.cells(last.shape[1])[:, 0].nonzero(as_tuple=True)
    rows = rows_of(last[at])  # (n, C)
    out = torch.zeros_like(last, dtype=rows.dtype)
    out[at] = rows
    return out if channels_last else out.permute(0, 3, 1, 2)
