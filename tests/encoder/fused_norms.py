"""Prints, as JSON, the Triton kernels that the compiler makes of packed norms, forward and backward; runs none of them.

    python tests/encoder/fused_norms.py

Inductor decides what to fuse by the graph and the kind of device, so a driver that only says "compute capability 9.0"
is enough to see its decisions. A process of its own, because the driver stays.
"""

import json
import re
from unittest import mock

import torch
import torch._inductor.config as inductor
import triton
from timm.layers import LayerNorm2d
from torch import nn
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

SHAPE = (1024, 64, 4, 4)  # V, C, b, b


class Named(DriverBase):
    """A driver that knows its target and can do nothing."""

    def __init__(self): ...

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


def kernels(norm, activation):
    """Names of the kernels of both passes under bf16 autocast."""
    x = torch.randn(SHAPE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def forward(x, parameters):
        with torch.autocast("cpu", torch.bfloat16):
            return activation(torch.func.functional_call(norm, parameters, (x,)))

    def both(x, grad):
        y, back = torch.func.vjp(forward, x, dict(norm.named_parameters()))
        return y, back(grad)

    sources = []

    def record(graph):
        sources.append(graph.codegen()[0].value)
        raise StopIteration("recorded")

    with (
        mock.patch.object(GraphLowering, "compile_to_module", record),
        inductor.patch(force_disable_caches=True, cpu_backend="triton"),
    ):
        try:
            torch.compile(both, fullgraph=True)(x, torch.randn_like(x))
        except Exception as error:
            if "recorded" not in str(error):
                raise
    return re.findall(r"def (triton_\w+)\(", sources[0])


if __name__ == "__main__":
    triton.runtime.driver.set_active(Named())
    layer, batch = LayerNorm2d(SHAPE[1]), nn.BatchNorm2d(SHAPE[1], track_running_stats=False)
    print(json.dumps({"layer": kernels(layer, nn.Identity()), "batch": kernels(batch, nn.ReLU())}))
