"""The GPU kernels: run by Triton's interpreter, compiled for a GPU that is not there, and chosen where they can run."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.conv import kernels as gpu

triton = pytest.importorskip("triton", reason="triton has no build for this platform")

ROOT = Path(__file__).parents[3]
NAMES = ("kernel", "fused", "batch_norm", "synced_norm", "projected_norm")
CASES = tuple(f"tests/encoder/conv/{name}_cases.py" for name in NAMES)
DRAWN = ("tests/encoder/conv/fused_properties.py", "tests/encoder/conv/batch_norm_drawn.py")  # by hypothesis


def run_cases(*files, **environment):
    """The cases in a process of their own, for Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_kernels_interpreted_on_the_cpu_equal_pytorch():
    run_cases(*CASES, TRITON_INTERPRET="1")


@pytest.mark.drill
def test_kernels_interpreted_on_drawn_cases_equal_pytorch():
    run_cases(*DRAWN, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_kernels_on_the_gpu_equal_pytorch():
    run_cases(*CASES)


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *values, **options: self.launches.append((grid, values, options))

    def compiled(self):
        """What Triton makes of the only launch for compute capability 9.0 (H100, H200)."""
        ((_, values, options),) = self.launches
        arguments = dict(zip(self.kernel.arg_names, values, strict=True))
        constants = {p.name: arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        kinds = {float: "fp32", int: "i32", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
        kinds |= {torch.int32: "*i32", torch.int64: "*i64"}
        signature = {
            name: "constexpr" if name in constants else kinds[getattr(v, "dtype", type(v))]
            for name, v in arguments.items()
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = triton.compiler.ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
        return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=options)


def module(name):
    return sys.modules[f"spark_fast.encoder.conv.kernels.{name}"]


HALO, DEPTHWISE = ("_gather_kernel", "_sum_kernel"), ("_convolve_kernel", "_weight_gradient_kernel")
WIDE, NARROW = (96, 8, 7, 1), (384, 2, 7, 2)  # C, b, k, patches that the layer looks beyond its own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "layer"),
    [*((kernel, WIDE) for kernel in (*HALO, *DEPTHWISE)), *((kernel, NARROW) for kernel in DEPTHWISE)],
)
def test_they_compile_for_a_gpu_that_is_not_there_and_read_16_bytes_at_a_time(kernel, layer, tmp_path, monkeypatch):
    """Compute capability 9.0 (H100, H200). A row of channels is read in vectors, and nothing spills to memory."""
    c, b, k, reach = layer
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = "halo_triton" if kernel in HALO else "depthwise_triton"
    recorder = Recorder(getattr(module(name), kernel))
    monkeypatch.setattr(module(name), kernel, recorder)
    around = VisiblePatches(torch.arange(20).repeat(64, 1), (7, 7)).neighbourhood(reach)
    cells, axis, p = torch.empty(len(around), b, b, c, dtype=torch.bfloat16), [k, 1, 1, k // 2, k // 2], k // 2
    if kernel == "_gather_kernel":
        gpu.gather_windows(cells, around, (p, p), (b + k - 1,) * 2)
    elif kernel == "_sum_kernel":
        gpu.sum_windows(cells.new_empty(len(around), b + k - 1, b + k - 1, c), around, (p, p), b)
    elif kernel == "_convolve_kernel":
        weight = torch.empty(c, 1, k, k, dtype=torch.bfloat16)
        gpu.depthwise_convolution(cells, weight, weight[:, 0, 0, 0].contiguous(), around, axis, axis)
    else:
        module(name).depthwise_weight_gradient(cells, cells, around, axis, axis)
    made = recorder.compiled()
    ptx = made.asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "ld.local" not in ptx
    assert made.asm["cubin"]
    if (kernel, layer) == ("_convolve_kernel", WIDE):
        assert ptx.count("ld.global.v4") <= 14 + 7 + 1, "cells of a row, taps of a row, the bias: each read once"
        assert ptx.count("fma.rn.f32") == 8 * 7 * 8, "outputs side by side, taps, channels"


@pytest.mark.parametrize("kernel", ["_convolve_kernel", "_input_gradient", "_weight_gradient_kernel"])
def test_an_implicit_gemm_multiplies_on_tensor_cores_and_reads_ahead_16_bytes_at_a_time(kernel, tmp_path, monkeypatch):
    """A strided layer of ResNet-50's stage 3, batch 32. Nothing spills to memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gemm = module("implicit_gemm_triton")
    visible, axis = VisiblePatches(torch.arange(20).repeat(32, 1), (7, 7)), [3, 2, 1, 1, 1]
    around, weight = visible.neighbourhood(1), torch.empty(256, 256, 3, 3, dtype=torch.bfloat16)
    cells = torch.empty(visible.count, 4, 4, 256, dtype=torch.bfloat16)
    grad = cells[:, ::2, ::2].contiguous()
    recorder = Recorder(getattr(gemm, kernel.replace("_input_gradient", "_convolve_kernel")))
    monkeypatch.setattr(gemm, recorder.kernel.__name__, recorder)
    if kernel == "_convolve_kernel":
        gemm.implicit_gemm(cells, weight, None, around, axis, axis)
    elif kernel == "_input_gradient":
        gemm.implicit_gemm_input_gradient(grad, weight, around, axis, axis)
    else:
        gemm.implicit_gemm_weight_gradient(grad, cells, around, axis, axis)
    ptx = recorder.compiled().asm["ptx"]
    assert "wgmma.mma_async.sync.aligned" in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "ld.local" not in ptx


NORM, RESPONSE, POINTWISE = "layer_norm_triton", "response_norm_triton", "pointwise_triton"


@pytest.mark.parametrize(
    ("name", "kernel", "call"),
    [
        (NORM, "_normalize_kernel", lambda x, bias: gpu.layer_norm(x, bias, bias, 1e-6, x.dtype)),
        (NORM, "_gradient_kernel", lambda x, bias: module(NORM).layer_norm_gradients(x, x, bias, 1e-6)),
        (RESPONSE, "_sums_kernel", lambda x, bias: module(RESPONSE)._sums(x, x, 4)),
        (RESPONSE, "_scale_kernel", lambda x, bias: module(RESPONSE)._scale(x, x, x, *bias.expand(2, 4, -1), 4)),
        (POINTWISE, "_gelu_kernel", gpu.gelu_of_sum),
        (POINTWISE, "_gelu_gradient_kernel", lambda x, bias: module(POINTWISE).gelu_of_sum_gradients(x, x, bias)),
        (POINTWISE, "_residual_kernel", lambda x, bias: gpu.scaled_residual(x, bias, bias, None, x.float())),
        (
            POINTWISE,
            "_residual_gradient_kernel",
            lambda x, bias: module(POINTWISE).scaled_residual_gradients(x.float(), x, bias, bias, None),
        ),
    ],
)
def test_norms_and_residuals_compile_for_a_gpu_that_is_not_there(name, kernel, call, tmp_path, monkeypatch):
    """16 bytes at a time, and nothing spills, at the widths of ConvNeXt-S's first stage."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorder = Recorder(getattr(module(name), kernel))
    monkeypatch.setattr(module(name), kernel, recorder)
    call(torch.empty(64, 64, 96, dtype=torch.bfloat16), torch.empty(96))
    ptx = recorder.compiled().asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx or kernel == "_sums_kernel", "which stores sums alone"
    assert "ld.local" not in ptx


def test_norms_and_residuals_take_the_kernels_under_autocast_alone():
    x = torch.zeros(1)
    assert not gpu.use_fused(None, x)
    assert not gpu.use_fused(True, x), "without autocast nothing is forced"
    with torch.autocast("cpu", torch.bfloat16):
        assert not gpu.use_fused(None, x)
        assert not gpu.use_fused(True, x.to("meta"))
        with pytest.raises(RuntimeError, match="requested but cannot run: the tensors are on cpu"):
            gpu.use_fused(True, x)
        compiled = torch.compile(lambda x: x + gpu.use_fused(True, x), fullgraph=True, backend="eager")
        assert compiled(x) == 0, "the compiler fuses them itself"


def test_pytorch_computes_on_the_cpu_and_forced_kernels_say_what_they_lack():
    like = torch.zeros(1)
    assert not gpu.use_kernels(None, like)
    assert not gpu.use_kernels(False, like)
    assert not gpu.use_kernels(True, torch.zeros(1, device="meta"))
    with pytest.raises(RuntimeError, match=r"requested but cannot run: the tensors are on cpu.*TRITON_INTERPRET=1"):
        gpu.use_kernels(True, like)


def on_cuda(dtype):
    return SimpleNamespace(is_meta=False, is_cuda=True, device=torch.device("cuda"), dtype=dtype)


def test_on_cuda_the_kernels_are_chosen_and_a_fallback_is_logged_once(caplog):
    gpu._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "spark_fast"):
        assert gpu.use_kernels(None, on_cuda(torch.bfloat16))
        assert not caplog.messages
        for _ in range(3):
            assert not gpu.use_kernels(None, on_cuda(torch.float64))
    assert len(caplog.messages) == 1
    assert "use PyTorch instead of the GPU kernels: they compute in fp32, bf16 or fp16, not in float64" in caplog.text


def test_a_fallback_that_is_logged_does_not_break_a_compiled_graph(caplog):
    gpu._say_once.cache_clear()

    @torch.compile(fullgraph=True, backend="eager")
    def layer(x):
        gpu._say("there is no kernel")
        return x + 1

    with caplog.at_level(logging.WARNING, "spark_fast"):
        assert layer(torch.zeros(1)) == 1
    assert "there is no kernel" in caplog.text


def test_neighbours_further_than_the_next():
    visible = VisiblePatches(torch.tensor([[0, 4, 5]]), (2, 3))  # x..    numbers 0..
    around = visible.neighbourhood(2)  # .xx            .12
    assert around.dtype == torch.int32
    assert around[0].tolist() == [[3] * 5, [3] * 5, [3, 3, 0, 3, 3], [3, 3, 3, 1, 2], [3] * 5]
    assert torch.equal(around[:, 1:4, 1:4].long(), visible.neighbours)
