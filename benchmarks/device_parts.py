"""The parts of `device_report`, in order of importance; each is a list of jobs, and each job gives one row."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import simplejpeg_stand_in
import torch
from measuring import clock
from PIL import Image
from torch import Tensor
from ways import WAYS, Shape, Way, build, inputs, median_seconds, tf32, train_step

from spark_fast.encoder import VisiblePatches
from spark_fast.masking import sample_visible
from spark_fast.reporting.flops import count as cost_of
from spark_fast.reporting.mfu import matmul_rate, peak_memory

ROOT = Path(__file__).parents[1]
GPU_TESTS = (
    "tests/encoder/conv/test_kernels.py",
    "tests/training/test_cuda_graph.py",
    "tests/reporting/test_step_timer.py",
)


class NotHereError(Exception):
    """This job cannot be done here, and why."""


@dataclass(frozen=True)
class Scale:
    """How large everything is: `FULL` on a GPU, `TINY` for the smoke test."""

    step_shapes: tuple[Shape, ...]
    encoder: Shape
    masks: tuple[float, ...]
    images: int
    workers: int
    repeats: int
    copy_mib: int
    compile: bool


FULL = Scale(
    step_shapes=(
        Shape("resnet50", 224, 0.6, 256),
        Shape("convnext_large", 224, 0.6, 64),
        Shape("convnext_small", 224, 0.6, 128),
        Shape("convnext_large", 384, 0.75, 32),
    ),
    encoder=Shape("resnet50", 224, 0.6, 256),
    masks=(0.0, 0.4, 0.6, 0.75),
    images=1024,
    workers=16,
    repeats=7,
    copy_mib=1024,
    compile=True,
)
TINY = Scale(
    step_shapes=(Shape("resnet10t", 64, 0.5, 4, 32), Shape("convnext_atto", 64, 0.5, 4, 32)),
    encoder=Shape("resnet10t", 64, 0.5, 4, 32),
    masks=(0.0, 0.5),
    images=16,
    workers=1,
    repeats=2,
    copy_mib=8,
    compile=False,
)


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    name: str
    run: Callable[[], dict[str, Any]]
    needs: float  # seconds, roughly


def all_parts(scale: Scale, device: torch.device) -> dict[str, list[Job]]:
    """Every part with its jobs, the most important first; nothing is computed yet."""
    steps = {f"step {s.model} {s.size}": list(_step_jobs(s, scale, device)) for s in scale.step_shapes}
    first = dict(islice(steps.items(), 1))
    return {
        "ceilings": list(_ceilings(scale, device)),
        "packed = masked": list(_equalities(scale, device)),
        **first,
        "GPU tests": [Job(path, partial(_gpu_tests, path, device), 60) for path in GPU_TESTS],
        "encoder": [Job(f"mask {m}", partial(_encoder, m, scale, device), 10) for m in scale.masks],
        "loader": list(_loader_jobs(scale, device)),
        **steps,
    }


def _ceilings(scale: Scale, device: torch.device) -> Iterator[Job]:
    def copy() -> dict[str, Any]:
        source = torch.empty(scale.copy_mib << 18, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        seconds = median_seconds(lambda: target.copy_(source), device, 10, 2)
        return {"GB/s": 2 * source.nbytes / seconds / 1e9}  # read and written

    yield Job("copy", copy, 3)
    yield Job("matmul bf16", lambda: {"TFLOP/s": matmul_rate(device, torch.bfloat16) / 1e12}, 3)
    yield Job("matmul fp32 (TF32)", lambda: {"TFLOP/s": matmul_rate(device, torch.float32) / 1e12}, 3)


def _equalities(scale: Scale, device: torch.device) -> Iterator[Job]:
    for shape in {s.model: s for s in scale.step_shapes}.values():
        for precision in ("fp32", "bf16"):
            small = replace(shape, batch=min(8, shape.batch))
            yield Job(f"{shape.model} {precision}", partial(_equality, small, precision, device), 20)


def _equality(shape: Shape, precision: str, device: torch.device) -> dict[str, Any]:
    """How far loss and gradient of either encoder are from the masked one in float64: packed no further than masked."""
    with tf32(False):
        loss, gradient = _loss_and_gradient(shape, Way("masked"), None, device)
        row: dict[str, Any] = {}
        for encoder in ("masked", "packed"):
            way = Way(encoder, kernels=None if encoder == "packed" else False)
            its_loss, its_gradient = _loss_and_gradient(shape, way, precision, device)
            row[f"{encoder} loss off by"] = abs(its_loss - loss) / loss
            row[f"{encoder} gradient off by"] = float((its_gradient - gradient).norm() / gradient.norm())
    rounding = {"fp32": 1e-5, "bf16": 2e-3}[precision]  # below it chance decides which of the two is nearer
    for what in ("loss", "gradient"):
        if not row[f"packed {what} off by"] <= 2 * row[f"masked {what} off by"] + rounding:
            raise AssertionError(f"the packed {what} is further off than the masked one: {row}")
    return row


def _loss_and_gradient(shape: Shape, way: Way, precision: str | None, device: torch.device) -> tuple[float, Tensor]:
    """Of the encoder, in float64; None computes in it, too. Layers that begin as good as absent are given weight."""
    model = build(way, shape, device)
    images, seen = inputs(model, shape, way, device)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.encoder.parameters():
        if parameter.dim() == 1:  # norms that begin at 0, layer scales that begin at 1e-6
            values = torch.rand(parameter.shape, generator=generator) * 0.5 + 0.5
            parameter.data.copy_(values)
    if precision is None:
        model, images = model.double(), images.double()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images, seen)
    loss.backward()
    gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat([g.double().flatten() for g in gradients])


def _step_jobs(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Job]:
    for name, way in WAYS.items():
        needs = 60 if way.compile != "off" else 15
        yield Job(name, partial(_step, shape, way, scale, device), needs)


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
    memory = peak_memory(device) / 2**30
    loss = float(step(0, *batch)[0])
    if not np.isfinite(loss):
        raise AssertionError(f"the loss is {loss}")
    rate = shape.batch / seconds
    return {
        "model": shape.model, "size": shape.size, "mask": shape.mask, "batch": shape.batch, "seconds": seconds,
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


def _gpu_tests(path: str, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        raise NotHereError("takes a GPU")
    if find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not interpreted", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
    if done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-1000:])
    return {"pytest": last}


def _loader_jobs(scale: Scale, device: torch.device) -> Iterator[Job]:
    for decode, augment in (("host", "host"), ("device", "device"), ("host", "device")):
        asked = {"pipeline": "torch", "decode_on": decode, "augment_on": augment}
        yield Job(f"decode on {decode}, augment on {augment}", partial(_loader, scale, device, asked, None), 20)
    way = WAYS["packed Triton"] if device.type == "cuda" else WAYS["packed eager"]
    for decode in ("device", "host"):
        asked = {"pipeline": "torch", "decode_on": decode, "augment_on": "device"}
        yield Job(f"end to end, decode on {decode}", partial(_loader, scale, device, asked, way), 30)
    for name, package in (("dali", "nvidia.dali"), ("ffcv", "ffcv")):
        yield Job(f"pipeline {name}", partial(_optional, scale, device, name, package), 30)


def _optional(scale: Scale, device: torch.device, name: str, package: str) -> dict[str, Any]:
    try:
        import_module(package)
    except ImportError as error:
        raise NotHereError(f"{name} is not installed ({error})") from None
    return _loader(scale, device, {"pipeline": name}, None)


def _loader(scale: Scale, device: torch.device, asked: dict[str, Any], way: Way | None) -> dict[str, Any]:
    """Images/s of the loader from generated shards; with a way, of the step that it feeds, and the wait for data."""
    row: dict[str, Any] = {}
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        simplejpeg_stand_in.put_in_place()
    if simplejpeg_stand_in.is_in_place():
        row["note"] = "no simplejpeg: torchvision decodes on the host, and a folder is read instead of shards"
    from spark_fast.pipelines import LoaderOptions, build_pipeline

    shape = scale.step_shapes[0]
    with TemporaryDirectory() as folder:
        data = _images(Path(folder), scale, shards=not row, beton=asked["pipeline"] == "ffcv")
        options = LoaderOptions(
            shape.batch, input_size=shape.size, device=device, workers=scale.workers, prefetch=4, **asked
        )
        pipeline = build_pipeline(data, options)
        try:
            batches = chain.from_iterable(pipeline.epoch(epoch) for epoch in count())
            return row | _consume(batches, shape, way, scale, device)
        finally:
            pipeline.close()


def _consume(batches: Iterator[Any], shape: Shape, way: Way | None, scale: Scale, device: torch.device) -> dict:
    step = positions = model = None
    if way is not None:
        model = build(way, shape, device)
        step, positions = train_step(way, model, device), torch.arange(shape.batch, device=device)
    waited, begun, steps = 0.0, 0.0, 4 * scale.repeats
    for number in range(-3, steps):  # three to warm up
        if number == 0:
            waited, begun = 0.0, clock(device)
        asked = time.perf_counter()
        images = next(batches).images
        waited += time.perf_counter() - asked
        if step is not None and model is not None and positions is not None:
            step(max(number, 0), images, sample_visible(0, number, positions, model.grid, model.num_visible))
    total = clock(device) - begun
    row = {"batch": shape.batch, "images/s": steps * shape.batch / total}
    return row | ({"model": shape.model, "data wait": waited / total} if way is not None else {})


def _images(folder: Path, scale: Scale, *, shards: bool, beton: bool) -> Path:
    """Photograph-like JPEGs, shorter side 256 px: noise that is smooth at several scales."""
    from spark_fast.pipelines.convert.beton_writer import BetonSettings
    from spark_fast.pipelines.convert.conversion import ConvertSettings, convert

    source, rng = folder / "source" / "class0", np.random.default_rng(0)
    source.mkdir(parents=True)
    for i in range(scale.images):
        picture = np.zeros((256, 340, 3), np.float32)
        for cells in (4, 16, 64):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(noise.resize((340, 256), Image.Resampling.BICUBIC), np.float32) / 3
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(source / f"{i:05d}.jpg", quality=90)
    if not shards:
        return source.parent
    both = BetonSettings() if beton else None
    (made, _), *_ = convert(source.parent, folder / "shards", ConvertSettings(), workers=1, beton=both)
    return made
