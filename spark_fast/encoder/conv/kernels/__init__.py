"""GPU kernels (Triton) for the layers that look across patches, and for norms and residuals; when they are used.

Each is registered as a `torch.library` operator with a fake and a gradient, so that `torch.compile(fullgraph=True)` and
CUDA graphs take it. `spark_fast.encoder.conv.convolve` computes the same by PyTorch: it serves every other
device and dtype, and is the oracle in tests. With TRITON_INTERPRET=1 in the environment (Triton's own variable, read
when it is imported) the kernels run on the CPU, slowly.

docs/explanation/gpu.md has the bytes and FLOPs of each.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("spark_fast")

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if INSTALLED:
    from spark_fast.encoder.conv.kernels.batch_norm_operators import (
        batch_norm_merge,
        batch_norm_moments,
        batch_norm_statistics,
    )
    from spark_fast.encoder.conv.kernels.batch_norm_operators import batch_norm_with_gradient as batch_norm_apply
    from spark_fast.encoder.conv.kernels.depthwise_triton import depthwise_with_gradient as depthwise_convolution
    from spark_fast.encoder.conv.kernels.halo_triton import gather_with_gradient as gather_windows
    from spark_fast.encoder.conv.kernels.halo_triton import sum_windows
    from spark_fast.encoder.conv.kernels.implicit_gemm_triton import implicit_gemm_with_gradient as implicit_gemm
    from spark_fast.encoder.conv.kernels.layer_norm_triton import layer_norm_with_gradient as layer_norm
    from spark_fast.encoder.conv.kernels.pointwise_triton import gelu_of_sum_with_gradient as gelu_of_sum
    from spark_fast.encoder.conv.kernels.pointwise_triton import residual_with_gradient as scaled_residual
    from spark_fast.encoder.conv.kernels.projected_norm_triton import MOST_CHANNELS, MOST_OUTPUTS
    from spark_fast.encoder.conv.kernels.projected_norm_triton import projected_norm_with_gradient as projected_norm
    from spark_fast.encoder.conv.kernels.response_norm_triton import response_norm_with_gradient as response_norm

__all__ = [
    "MOST_CHANNELS",
    "MOST_OUTPUTS",
    "batch_norm_apply",
    "batch_norm_merge",
    "batch_norm_moments",
    "batch_norm_statistics",
    "depthwise_convolution",
    "gather_windows",
    "gelu_of_sum",
    "implicit_gemm",
    "layer_norm",
    "projected_norm",
    "response_norm",
    "scaled_residual",
    "sum_windows",
    "use_fused",
    "use_kernels",
]


def use_kernels(wanted: bool | None, like: Tensor) -> bool:
    """Whether the kernels compute with tensors such as `like`.

    Args:
        wanted: True or False forces it. None: on CUDA; if they cannot run there, the log says so once.
        like: of any shape. They can run where Triton is installed and its dtype is fp32, bf16 or fp16.

    Raises:
        RuntimeError: they are forced and cannot run.
    """
    if wanted is False or like.is_meta or (wanted is None and not like.is_cuda):
        return False
    obstacle = _obstacle(like.device.type, like.dtype)
    if obstacle and wanted:
        raise RuntimeError(f"the GPU kernels were requested but cannot run: {obstacle}")
    if obstacle:
        _say(obstacle)
    return not obstacle


def use_fused(wanted: bool | None, like: Tensor) -> bool:
    """Whether the kernels compute norms, activations and residuals too: in eager mode, under autocast.

    `like`: of any shape, as for `use_kernels`. Without autocast there are no casts to save, and results stay
    PyTorch's to the bit. In compiled code the compiler fuses these layers with their neighbours.
    """
    if torch.compiler.is_compiling() or like.is_meta or not torch.is_autocast_enabled(like.device.type):
        return False
    return use_kernels(wanted, like)


def _obstacle(device: str, dtype: torch.dtype) -> str:
    """Why the kernels cannot run, nothing where they can."""
    if not INSTALLED:
        return "triton is not installed (pip install triton)"
    if device != "cuda" and not INTERPRETED:
        return f"the tensors are on {device}, which takes TRITON_INTERPRET=1 in the environment from the start"
    if dtype not in DTYPES:
        return f"they compute in fp32, bf16 or fp16, not in {str(dtype).removeprefix('torch.')}"
    return ""


@torch.compiler.assume_constant_result  # run by the compiler while it traces: a log call in a graph would break it
def _say(obstacle: str) -> None:
    _say_once(obstacle)


@cache
def _say_once(obstacle: str) -> None:
    log.warning("layers that read neighbouring patches use PyTorch instead of the GPU kernels: %s", obstacle)
