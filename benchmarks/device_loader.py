"""How fast images come: decoded and augmented on the host or the device, alone and as the food of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property, partial
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import simplejpeg_stand_in
import torch
from device_jobs import Job, NotHereError, Scale
from measuring import clock
from PIL import Image
from ways import WAYS, Shape, Way, build, train_step

from spark_fast.masking import sample_visible

DIFFERENT = 64  # pictures; the others are copies


def loader_jobs(scale: Scale, device: torch.device) -> Iterator[Job]:
    """A row for each way to load; the first one makes the pictures, for all."""
    pictures = Pictures(scale.images)
    for decode, augment in (("host", "host"), ("device", "device"), ("host", "device")):
        asked = {"pipeline": "torch", "decode_on": decode, "augment_on": augment}
        run = partial(_loader, scale, device, asked, None, pictures)
        yield Job(f"decode on {decode}, augment on {augment}", run, 10)
    way = WAYS["packed Triton"] if device.type == "cuda" else WAYS["packed eager"]
    for decode in ("device", "host"):
        asked = {"pipeline": "torch", "decode_on": decode, "augment_on": "device"}
        yield Job(f"end to end, decode on {decode}", partial(_loader, scale, device, asked, way, pictures), 15)
    for name, package in (("dali", "nvidia.dali"), ("ffcv", "ffcv")):
        yield Job(f"pipeline {name}", partial(_optional, scale, device, name, package, pictures), 20)


class Pictures:
    """Photograph-like JPEGs, shorter side 256 px: noise that is smooth at several scales. Made when first asked for."""

    def __init__(self, images: int) -> None:
        self._images = images

    @cached_property
    def _folder(self) -> TemporaryDirectory:
        return TemporaryDirectory()

    @cached_property
    def folder(self) -> Path:
        """Class folders."""
        root, rng, files = Path(self._folder.name) / "source", np.random.default_rng(0), []
        (root / "class0").mkdir(parents=True)
        for i in range(self._images):
            path = root / "class0" / f"{i:05d}.jpg"
            if i < DIFFERENT:
                _picture(rng).save(path, quality=90)
                files.append(path.read_bytes())
            else:
                path.write_bytes(files[i % DIFFERENT])
        return root

    @cached_property
    def shards(self) -> Path:
        """The same, converted."""
        return self._converted("shards")

    @cached_property
    def beton(self) -> Path:
        """The same, with a .beton beside the shards."""
        from spark_fast.pipelines.convert.beton_writer import BetonSettings

        return self._converted("beton", beton=BetonSettings())

    def _converted(self, name: str, **more: Any) -> Path:
        from spark_fast.pipelines.convert.conversion import ConvertSettings, convert

        (made, _), *_ = convert(self.folder, Path(self._folder.name) / name, ConvertSettings(), workers=1, **more)
        return made


def _picture(rng: np.random.Generator) -> Image.Image:
    pixels = np.zeros((256, 340, 3), np.float32)
    for cells in (4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += np.asarray(noise.resize((340, 256), Image.Resampling.BICUBIC), np.float32) / 3
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _optional(scale: Scale, device: torch.device, name: str, package: str, pictures: Pictures) -> dict[str, Any]:
    try:
        import_module(package)
    except ImportError as error:
        raise NotHereError(f"{name} is not installed ({error})") from None
    return _loader(scale, device, {"pipeline": name}, None, pictures)


def _loader(
    scale: Scale, device: torch.device, asked: dict[str, Any], way: Way | None, pictures: Pictures
) -> dict[str, Any]:
    """Images/s of the loader from generated shards; with a way, of the step that it feeds, and the wait for data."""
    row: dict[str, Any] = {}
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        simplejpeg_stand_in.put_in_place()
    if simplejpeg_stand_in.is_in_place():
        row["note"] = "no simplejpeg: torchvision decodes on the host, and a folder is read instead of shards"
        if asked["pipeline"] == "ffcv":
            raise NotHereError("no simplejpeg, with which the converter writes a .beton")
    from spark_fast.pipelines import LoaderOptions, build_pipeline

    shape = scale.step_shapes[0]
    data = pictures.folder if row else pictures.beton if asked["pipeline"] == "ffcv" else pictures.shards
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
