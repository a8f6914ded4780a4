"""Images per second of every way to feed a ConvNet from ImageNet's files, on one core and on all.

    python benchmarks/loader_throughput.py --data_path ../shared/data/imagenet_sample
    python benchmarks/loader_throughput.py --data_path ../shared/data/imagenet_sample --bands --name loader_bands

With `--bands`, images of 1 and 12 channels of 16 bits take their place, as many as the photographs: see `band_loaders`.
Every candidate turns the same images into normalised fp32 batches, 224 px, from a warm cache, in a process of its own
that is pinned to the cores it may use before anything is imported. They take turns; a figure is the median. The images
are listed `--copies` times, so that starting an epoch counts for little. What is not installed is left out, and said.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import band_loaders
import torch
import tyro
from measuring import machine, medians, repeated, save, start_on_cores, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spark_fast.pipelines import LoaderOptions, build_pipeline
from spark_fast.pipelines.sampler import order, uniform
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.transforms.crops import DRAWS, random_box
from spark_fast.pipelines.transforms.device_augment import DeviceAugment
from spark_fast.pipelines.transforms.resize import MEAN, STD, Normalise

STORES = {"max 256": ("--max_side", "256"), "short 256": ("--short_side", "256"), "max 400": ("--max_side", "400")}
ORIGINALS = "originals"
LIBRARIES = (
    "simplejpeg",
    "pillow",
    "torchvision",
    "ffcv",
    "nvidia-dali-cuda130",
    "spdl_io",
    "webdataset",
    "tifffile",
)  # that decode
SIZE = 224
SCALE = (0.67, 1.0)


@dataclass
class Options:
    """What to measure."""

    data_path: Path
    """a folder of class folders, or one that holds train/"""
    copies: int = 8
    """times that each image is listed"""
    batch: int = 64
    repeats: int = 5
    """measurements of each figure"""
    cores: tuple[int, ...] = (1, 2)
    bands: bool = False
    """images of 1 and 12 channels of 16 bits, in place of photographs"""
    only: tuple[str, ...] = ()
    """candidates to measure; none: all"""
    work: Path | None = None
    """where the stores are made and kept; none: a temporary folder"""
    name: str = "loader_throughput"
    """the result is kept as benchmarks/results/<name>.json"""


def ours(pipeline: str, **settings: Any) -> Callable[[Path, int, int], Iterator[None]]:
    """One of this project's pipelines; each `next` is one epoch."""

    def epochs(store: Path, batch: int, cores: int) -> Iterator[None]:
        options = LoaderOptions(batch, pipeline, input_size=SIZE, workers=cores, **settings)
        loader = build_pipeline(store, options)
        number = 0
        while True:
            exhaust(loader.epoch(number))
            number += 1
            yield

    return epochs


class HostPart(DeviceAugment):
    """Leaves out what the device would do."""

    def __call__(self, cells: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
        return cells


def host_part(store: Path, batch: int, cores: int) -> Iterator[None]:
    """The host's work when the device augments: crops decoded into cells, ready for the transfer."""
    with patch("spark_fast.pipelines.backends.torch_pipeline.DeviceAugment", HostPart):
        yield from ours("torch", augment_on="device")(store, batch, cores)


def pil_transform() -> Callable[[Any], torch.Tensor]:
    """SparK's augmentation as the published code has it, on PIL images."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def published(store: Path, batch: int, cores: int) -> Iterator[None]:
    """The published code's: torchvision transforms on PIL images, in worker processes."""
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(store), pil_transform())
    loader = torch.utils.data.DataLoader(
        images, batch, shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True
    )
    while True:
        exhaust(loader)
        yield


def webdataset(store: Path, batch: int, cores: int) -> Iterator[None]:
    """WebDataset over the same shards, PIL and torchvision's transforms behind it."""
    import webdataset as wds

    shards = sorted(str(path) for path in store.glob("*.tar"))
    images = wds.WebDataset(shards, shardshuffle=False, workersplitter=wds.split_by_worker, empty_check=False)
    images = images.shuffle(256).decode("pil").to_tuple("jpg").map_tuple(pil_transform())
    loader = torch.utils.data.DataLoader(images, batch, num_workers=cores, persistent_workers=True)
    while True:
        exhaust(loader)
        yield


def dali(store: Path, batch: int, cores: int) -> Iterator[None]:
    """DALI as its manual shows it: its own reader over the shards' indexes, random crop, cubic resize."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=cores, device_id=None)
    def graph() -> Any:
        shards = sorted(str(path) for path in store.glob("*.tar"))
        indexes = [str(Path(path).with_suffix(".idx")) for path in shards]
        jpegs = fn.readers.webdataset(paths=shards, index_paths=indexes, ext=["jpg"], random_shuffle=True, name="read")
        images = fn.decoders.image_random_crop(jpegs, random_area=SCALE, random_aspect_ratio=(3 / 4, 4 / 3))
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop_mirror_normalize(
            images, mean=[255 * m for m in MEAN], std=[255 * s for s in STD], mirror=fn.random.coin_flip()
        )

    loader = graph()
    loader.build()
    steps = loader.epoch_size("read") // batch
    while True:
        for _ in range(steps):
            (images,) = loader.run()
            torch.from_dlpack(images.as_tensor()).clone()
        yield


def ffcv(store: Path, batch: int, cores: int) -> Iterator[None]:
    """FFCV as its manual shows it: its own loader, decoder and area resampling over the `.beton`."""
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE)
    steps = [decoder, RandomHorizontalFlip(), NormalizeImage(mean, std, np.dtype(np.float32)), ToTensor()]
    loader = Loader(
        str(next(store.glob("*.beton"))),
        batch_size=batch,
        num_workers=cores,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": [*steps, ToTorchImage()], "label": None},
    )
    while True:
        for (images,) in loader:  # the label is left out
            images.clone()  # its buffers are reused
        yield


def spdl(store: Path, batch: int, cores: int) -> Iterator[None]:
    """SPDL as its manual shows it: FFmpeg decodes and filters in threads; the bytes come from the same shards."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    source, normalise = detect_source(store), Normalise(SIZE, torch.device("cpu"), torch.float32)

    def decode(draws: list[float], i: int) -> Any:
        packets = spdl.io.demux_image(bytes(source.read(i)))
        box = random_box(draws, packets.codec.height, packets.codec.width, SCALE, (3 / 4, 4 / 3))
        crop = f"crop={box.width}:{box.height}:{box.left}:{box.top},scale={SIZE}:{SIZE}:flags=bicubic"
        flip = ",hflip" if draws[-1] < 0.5 else ""
        return spdl.io.decode_packets(packets, filter_desc=f"{crop}{flip},format=pix_fmts=rgb24")

    def collate(frames: list[Any]) -> torch.Tensor:
        return normalise(spdl.io.to_torch(spdl.io.convert_frames(frames)))

    steps, epoch = len(source) // batch, 0
    while True:
        ids = order(len(source), 0, epoch)[: steps * batch]
        draws = uniform(0, epoch, ids, DRAWS).tolist()
        builder = PipelineBuilder().add_source(zip(draws, ids.tolist(), strict=True))
        builder = builder.pipe(lambda pair: decode(*pair), concurrency=cores).aggregate(batch).pipe(collate)
        loader = builder.add_sink(2).build(num_threads=cores)
        with loader.auto_stop():
            exhaust(loader)
        epoch += 1
        yield


@dataclass(frozen=True)
class Candidate:
    """A loader, the stores it reads, and the package without which it is left out."""

    epochs: Callable[[Path, int, int], Iterator[None]]
    stores: tuple[str, ...]
    needs: str = ""


CANDIDATES = {
    "torch (ours)": Candidate(ours("torch"), (*STORES, ORIGINALS)),
    "torch (ours), host part": Candidate(host_part, (*STORES, ORIGINALS)),
    "ffcv (ours)": Candidate(ours("ffcv"), tuple(STORES), "ffcv"),
    "dali (ours)": Candidate(ours("dali"), (*STORES, ORIGINALS), "nvidia.dali"),
    "ImageFolder, PIL": Candidate(published, (ORIGINALS,)),
    "FFCV, its loader, area": Candidate(ffcv, tuple(STORES), "ffcv"),
    "DALI, its reader": Candidate(dali, tuple(STORES), "nvidia.dali"),
    "SPDL": Candidate(spdl, (*STORES, ORIGINALS), "spdl.io"),
    "webdataset, PIL": Candidate(webdataset, tuple(STORES), "webdataset"),
}
for _store, _channels in band_loaders.CHANNELS.items():
    _both = (_store, f"{_store}, shards")
    CANDIDATES[f"torch (ours), {_store}"] = Candidate(band_loaders.ours(_channels, SIZE, SCALE), _both, "tifffile")
    CANDIDATES[f"DataLoader, tifffile, v2, {_store}"] = Candidate(
        band_loaders.plain(_channels, SIZE, SCALE), _both, "tifffile"
    )


def exhaust(batches: Iterable[Any]) -> None:
    """Take every batch, and do nothing with it."""
    for _ in batches:
        pass


def serve(name: str, store: Path, batch: int, cores: int, pipe: Connection) -> None:
    """In a process of its own: an epoch and its seconds for every request."""
    epochs = CANDIDATES[name].epochs(store, batch, cores)
    while pipe.recv():
        start = time.perf_counter()
        next(epochs)
        pipe.send(time.perf_counter() - start)


class Pinned:
    """A candidate in a process that may use `cores` cores alone, from the `first` on."""

    def __init__(self, name: str, store: Path, batch: int, cores: int, first: int = 0) -> None:
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(name, store, batch, cores, theirs), daemon=False
        )
        start_on_cores(process, cores, first)
        theirs.close()
        self._process = process

    def __call__(self) -> tuple[float]:
        """Seconds of one epoch; EOFError when the process died."""
        self.begin()
        return self.end()

    def begin(self) -> None:
        """Have it start an epoch."""
        self._pipe.send(True)

    def end(self) -> tuple[float]:
        """Wait for the epoch's end; its seconds."""
        return (self._pipe.recv(),)

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def make_stores(options: Options, work: Path) -> dict[str, Path]:
    """A folder with every original `copies` times, and its conversions; or the same of images of 16 bits."""
    originals, stores = work / "originals", {}
    if options.bands:
        images = options.copies * len(detect_source(options.data_path))
        for name, channels in band_loaders.CHANNELS.items():
            stores[name] = work / f"{channels}_channels"
            band_loaders.write_files(stores[name], channels, images)
            flags = ("--in_chans", str(channels), "--short_side", "0")
            stores[f"{name}, shards"] = convert(
                stores[name], work / f"{channels}_channels{band_loaders.OF_SHARDS}", flags
            )
        return stores
    repeated(options.data_path, options.copies, originals)
    what = ("--format", "both" if installed("ffcv") else "shards")
    converted = {name: convert(originals, work / name.replace(" ", "_"), (*f, *what)) for name, f in STORES.items()}
    return {**converted, ORIGINALS: originals}


def convert(src: Path, dst: Path, flags: tuple[str, ...]) -> Path:
    """Convert a folder, as a person does; returns the new one."""
    tool = Path(__file__).parents[1] / "tools" / "convert_imagenet.py"
    done = subprocess.run([sys.executable, str(tool), str(src), str(dst), *flags], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"converting to {dst} failed:\n{done.stderr}")
    return dst


def measure(options: Options, stores: dict[str, Path], images: int) -> list[dict]:
    """A row for each (candidate, store, cores): images per second."""
    rows = []
    chosen = {name: c for name, c in CANDIDATES.items() if not options.only or name in options.only}
    for name in [name for name, c in chosen.items() if not installed(c.needs)]:
        print(f"{name} is left out: {chosen.pop(name).needs} is not installed")
    pairs = [(store, cores) for store in stores for cores in options.cores]
    for store, cores in track(pairs, "measuring"):
        taking_part = [name for name, c in chosen.items() if store in c.stores]
        running = {name: Pinned(name, stores[store], options.batch, cores) for name in taking_part}
        try:
            seconds = medians(running, options.repeats)  # type: ignore[arg-type]
        finally:
            for candidate in running.values():
                candidate.close()
        epoch = images // options.batch * options.batch
        rows += [
            {"loader": name, "store": store, "cores": cores, "images_per_second": epoch / time_[0]}
            for name, time_ in seconds.items()
        ]
    return rows


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return not package or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def show(rows: list[dict]) -> None:
    """Print the table: a row per loader, a column per store and number of cores."""
    columns = list(dict.fromkeys((row["store"], row["cores"]) for row in rows))
    table = Table(title=f"images per second, {SIZE} px, normalised fp32; medians")
    table.add_column("loader")
    for store, cores in columns:
        table.add_column(f"{store}\n{cores} core{'s' if cores > 1 else ''}", justify="right")
    for name in dict.fromkeys(row["loader"] for row in rows):
        figures = {(r["store"], r["cores"]): f"{r['images_per_second']:.0f}" for r in rows if r["loader"] == name}
        table.add_row(name, *[figures.get(column, "") for column in columns])
    Console(width=150).print(table)


def main(options: Options) -> None:
    """Make the stores, measure every candidate, print the table and keep the result."""
    with tempfile.TemporaryDirectory() as temporary:
        stores = make_stores(options, options.work or Path(temporary))
        images = options.copies * len(detect_source(options.data_path))
        rows = measure(options, stores, images)
    show(rows)
    settings = {"images": images, "batch": options.batch, "repeats": options.repeats, "size": SIZE}
    where = machine(torch.device("cpu"), max(options.cores)) | {"versions": versions(LIBRARIES)}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
