"""The parts of `device_report`, in order of importance; each is a list of jobs, and each job gives one row."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg_stand_in
import torch
from device_equality import equality_jobs
from device_jobs import TINY, Job, NotHereError, Scale
from device_layers import layer_jobs
from device_loader import loader_jobs
from measuring import clock, machine, versions
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from ways import WAYS, Shape, Way, build, inputs, median_seconds, tf32, train_step

from spark_fast.encoder import VisiblePatches
from spark_fast.reporting.flops import count as cost_of
from spark_fast.reporting.mfu import matmul_rate, peak_memory

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "simplejpeg", "tyro", "tomli-w", "nvidia-dali-cuda130", "ffcv",
)  # fmt: skip
GPU_TESTS = (
    "tests/training/test_cuda_graph.py",
    "tests/reporting/test_step_timer.py",
    "tests/encoder/conv/kernel_cases.py",
    "tests/encoder/conv/fused_cases.py",
    "tests/encoder/conv/batch_norm_cases.py",
)


def all_parts(scale: Scale, device: torch.device, out: Path) -> dict[str, list[Job]]:
    """Every part with its jobs, the most important first; nothing is computed yet.

    Args:
        out: the folder for what is no row: a trace, the output of tests.
    """
    eager, compiled = {}, {}
    for shape in scale.step_shapes:
        name = f"step {shape.model} {shape.size}"
        eager[name] = list(_step_jobs(shape, scale, device, compiled=False))
        compiled[f"compiled {name}"] = list(_step_jobs(shape, scale, device, compiled=True))
    (first, first_jobs), *others = eager.items()
    (first_compiled, its_jobs), *others_compiled = compiled.items()
    return {
        "ceilings": list(_ceilings(scale, device)),
        first: first_jobs,
        "profile": [Job(scale.step_shapes[0].model, partial(_profile, scale.step_shapes[0], device, out), 15)],
        "layers": list(layer_jobs(scale, device)),
        "GPU tests": [Job("graph, events, kernels", partial(_gpu_tests, device, out), 60)],
        first_compiled: its_jobs,
        others[0][0]: others[0][1],
        f"step {scale.fcmae.model} {scale.fcmae.size} FCMAE": list(
            _step_jobs(scale.fcmae, scale, device, compiled=False)
        ),
        "encoder": [Job(f"mask {m}", partial(_encoder, m, scale, device), 5) for m in scale.masks],
        "loader": list(loader_jobs(scale, device)),
        "packed = masked": list(equality_jobs(scale, device)),
        **dict(others[1:]),
        **dict(others_compiled),
    }


def _ceilings(scale: Scale, device: torch.device) -> Iterator[Job]:
    def copy() -> dict[str, Any]:
        source = torch.empty(scale.copy_mib << 18, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        seconds = median_seconds(lambda: target.copy_(source), device, 10, 2)
        return {"GB/s": 2 * source.nbytes / seconds / 1e9}  # read and written

    def here() -> dict[str, Any]:
        where = machine(device, torch.get_num_threads())
        return where | {"smoke_test": scale is TINY, "versions": versions(PACKAGES)}

    yield Job("machine", here, 1)
    yield Job("copy", copy, 2)
    yield Job("matmul bf16", lambda: {"TFLOP/s": matmul_rate(device, torch.bfloat16) / 1e12}, 2)
    yield Job("matmul fp32 (TF32)", lambda: {"TFLOP/s": matmul_rate(device, torch.float32) / 1e12}, 2)


def _step_jobs(shape: Shape, scale: Scale, device: torch.device, *, compiled: bool) -> Iterator[Job]:
    for name, way in WAYS.items():
        if (way.compile != "off") is compiled:
            yield Job(name, partial(_step, shape, way, scale, device), 40 if compiled else 10)


def _step(shape: Shape, way: Way, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Images/s, MFU and peak memory; where the batch does not fit, of half of it, and so on."""
    if way.needs_gpu and device.type != "cuda":
        raise NotHereError("takes a GPU")
    if way.compile != "off" and not scale.compile:
        raise NotHereError("the smoke test does not compile")
    try:
        return _measured_step(shape, way, scale, device)
    except torch.cuda.OutOfMemoryError:
        if shape.batch < 32:
            raise
    # here the exception is gone, and what it held
    half = replace(shape, batch=shape.batch // 2)
    return {"note": f"out of memory with {shape.batch} images"} | _step(half, way, scale, device)


def _measured_step(shape: Shape, way: Way, scale: Scale, device: torch.device) -> dict[str, Any]:
    torch._dynamo.reset()
    if device.type == "cuda":
        gc.collect()  # what a batch that did not fit has left
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(way, shape, device)
    cost = cost_of(model)
    step, batch, numbers = train_step(way, model, device), inputs(model, shape, way, device), count()
    with tf32(True) if way.published else nullcontext():
        seconds = median_seconds(lambda: step(next(numbers), *batch), device, scale.repeats, 6 if way.graph else 3)
    begun = clock(device)
    result, _ = step(0, *batch)
    host = time.perf_counter() - begun  # until all is launched: a GPU that is faster waits for it
    loss, memory = float(result), peak_memory(device) / 2**30
    if not np.isfinite(loss):
        raise AssertionError(f"the loss is {loss}")
    rate = shape.batch / seconds
    return {
        "model": shape.model, "size": shape.size, "mask": shape.mask, "batch": shape.batch, "seconds": seconds,
        "host seconds": host,
        "images/s": rate, "MFU": rate * cost.flop_per_image / matmul_rate(device, torch.bfloat16),
        "peak GiB": memory, "loss": loss,
    }  # fmt: skip


def _encoder(mask: float, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Forward and backward of the encoder alone, packed."""
    way = Way(kernels=None)
    shape = replace(scale.encoder, mask=mask or 0.5)
    model = build(way, shape, device)
    images, seen = inputs(model, shape, way, device)
    if not mask:
        patches = model.grid[0] * model.grid[1]
        seen = torch.arange(patches, device=device).expand(shape.batch, -1).contiguous()

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            features = model.encoder(images, VisiblePatches(seen, model.grid))
        torch.autograd.backward(features, [torch.ones_like(f) for f in features])
        model.zero_grad()

    return {"model": shape.model, "mask": mask, "seconds": median_seconds(run, device, scale.repeats, 3)}


def _profile(shape: Shape, device: torch.device, out: Path) -> dict[str, Any]:
    """Two steps for a trace viewer, and the kernels that take longest."""
    way = WAYS["packed Triton"] if device.type == "cuda" else WAYS["packed eager"]
    model = build(way, shape, device)
    step, batch = train_step(way, model, device), inputs(model, shape, way, device)
    for number in range(3):
        step(number, *batch)
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        for number in (3, 4):
            step(number, *batch)
        if on_gpu:
            torch.cuda.synchronize()
    trace = out / f"trace_{shape.model}.json.gz"
    profiler.export_chrome_trace(str(trace))
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [event for event in profiler.key_averages() if getattr(event, spent) > 0]
    if on_gpu:  # kernels and copies; operators have their time once more, and so have ranges with a name
        found = [event for event in found if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    found.sort(key=lambda event: -getattr(event, spent))
    return {
        "trace": trace.name,
        "ms": sum(getattr(event, spent) for event in found) / 2000,
        "launches": sum(event.count for event in found) // 2,
        "longest": {event.key[:100]: getattr(event, spent) / 2000 for event in found[:20]},  # ms of a step
    }


def _gpu_tests(device: torch.device, out: Path) -> dict[str, Any]:
    """The tests that need a GPU, by eight processes: most of their time goes into compiling kernels on the host."""
    if device.type != "cuda":
        raise NotHereError("takes a GPU")
    if find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", "not interpreted", *GPU_TESTS]
    command += ["--continue-on-collection-errors", *(["-n", "8"] if find_spec("xdist") else [])]
    environment = dict(os.environ)
    if find_spec("simplejpeg") is None:  # which these tests import, and do not use
        environment["PYTEST_PLUGINS"] = simplejpeg_stand_in.__name__
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    output = out / "gpu_tests.log"  # shows how far they came, should they be cut off
    with output.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=240)
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    if done.returncode:
        raise AssertionError("\n".join(lines[-60:]))
    return {"pytest": lines[-1], "output": output.name}
