"""What a pipeline is asked for: how the images are seen, and how they are loaded. A mistake is a SettingsError."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from spark_fast.errors import SettingsError
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.scaling import SCALES
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.pipelines.transforms.decode import MEGAPIXEL

PIPELINES = ("auto", "torch", "dali", "ffcv", "synthetic")
PLACES = ("host", "device")
RESIZES = ("bicubic", "area")  # as the published code does it; FFCV's own


def are_photographs(in_chans: int, scaling: str) -> bool:
    """Whether images are RGB of 8 bits, normalised by ImageNet's mean and deviation, whatever their files hold."""
    return in_chans == 3 and scaling == "auto"


@dataclass(frozen=True)
class View:
    """Which images are seen, in which order, and how each is cropped and flipped.

    With `augment=False` nothing is drawn: the crop is central, of `centre` times the largest one's side.
    """

    split: str = "train"  # a folder in the data path, see `detect_source`
    in_order: bool = False  # every image once, as listed, and no batch dropped; else shuffled anew in each epoch
    repeats: int = 1  # augmentation draws of an image in an epoch, which then has so many fewer images
    shuffle_block: int = 0  # shards whose images are shuffled with each other; 0: all images are
    augment: bool = True
    scale: tuple[float, float] = (0.67, 1.0)  # of the random crop: share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # of the random crop: width / height
    flip: bool = True  # with probability 1/2
    vflip: bool = False  # upside down, with probability 1/2 ("torch" alone)
    rot90: bool = False  # by 0 to 3 quarter turns ("torch" alone)
    centre: float = 1.0  # of the central crop; timm's crop_pct

    def __post_init__(self) -> None:
        if self.shuffle_block < 0:
            raise SettingsError(f"shuffle_block must be a number of shards, or 0, got {self.shuffle_block}")
        if self.repeats < 1 or not 0 < self.centre <= 1:
            raise SettingsError(
                f"repeats must be 1 or more and centre above 0 and at most 1, got {self.repeats} and {self.centre}"
            )


@dataclass(frozen=True)
class LoaderOptions:
    """How one rank loads its share of the images: `LoaderOptions(batch_size=64)` is enough on a CPU.

    "auto" is the fastest installed pipeline for the data, and the log says which. "synthetic" ignores the data path.
    `decode_on="device"` and `augment_on="device"` are for "torch" (or "auto") alone.
    """

    batch_size: int  # the global batch, over all ranks
    pipeline: str = "auto"  # one of PIPELINES
    input_size: int | tuple[int, int] = 224  # a side, or (height, width)
    in_chans: int = 3  # channels of the images
    scaling: str = "auto"  # one of SCALES, --scale; "auto": photographs where there are three channels, else "dtype"
    statistics: Statistics | None = None  # by which images that are no photographs are normalised; None: measured
    mean: tuple[float, ...] = ()  # a number a channel, of the scaled images, in place of the measured ones
    std: tuple[float, ...] = ()
    channels_first: bool = False  # .npy and .npz hold (C, H, W)
    npz_key: str = ""  # the array of an .npz; "": the only one
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32  # of the normalised images
    workers: int = 2  # decoder threads of this rank
    worker_processes: int | Literal["auto"] = "auto"  # that they are spread over; 0: this one; for "torch" alone
    prefetch: int = 2  # batches that they may be ahead
    max_bad_fraction: float = 0.01  # of unreadable images, above which an epoch ends with DataError
    max_pixels: int = 64  # million (2**20) pixels of an image, above which it counts as unreadable
    decode_on: str = "host"  # "device": nvJPEG, and the augmentation there, too
    augment_on: str = "host"  # "device": crops are resized, flipped and normalised there
    ffcv_resize: str = "bicubic"  # one of RESIZES
    synthetic_samples: int = 1_281_167  # as many as ImageNet has
    cache_dir: str = ""  # where shards of a server are kept; "": see `default_folder`
    cache_size: str = "50GB"  # at most so much of them, see `bytes_of`
    view: View = View()

    def __post_init__(self) -> None:
        _check_choice("pipeline", self.pipeline, PIPELINES)
        _check_choice("decoding on", self.decode_on, PLACES)
        _check_choice("augmenting on", self.augment_on, PLACES)
        _check_choice("ffcv_resize", self.ffcv_resize, RESIZES)
        if min(self.size) < 1:
            raise SettingsError(f"input_size must be 1 pixel or more, got {self.input_size}")
        if self.in_chans < 1:
            raise SettingsError(f"in_chans must be 1 or more, got {self.in_chans}")
        _check_choice("scale", self.scaling, SCALES)
        bytes_of(self.cache_size)
        self._check_bands()
        if self.max_pixels < 1:
            raise SettingsError(f"max_pixels must be 1 (million) or more, got {self.max_pixels}")
        if self.on_device and self.pipeline not in ("auto", "torch", "synthetic"):
            raise SettingsError(
                f"pipeline {self.pipeline} cannot use the device for decoding or augmentation: use torch, or the host"
            )
        self._check_worker_processes()
        if self.batch_size < 1 or self.world_size < 1 or self.batch_size % self.world_size:
            lower = max(self.batch_size, 0) // max(self.world_size, 1) * self.world_size
            raise SettingsError(
                f"a global batch of {self.batch_size} cannot be shared equally by {self.world_size} processes:"
                f" use a multiple of {self.world_size}, such as {lower or self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise SettingsError(f"rank must be at least 0 and below world_size, {self.world_size}, got {self.rank}")

    def _check_worker_processes(self) -> None:
        asked = self.worker_processes
        if asked == "auto":
            return
        if asked < 0:
            raise SettingsError(f"worker_processes must be 0 or more, or auto, got {asked}")
        if asked > 0 and (self.pipeline in ("dali", "ffcv") or self.decode_on == "device"):
            raise SettingsError("worker_processes needs pipeline torch and decoding on the host: use 0 or auto")

    def _check_bands(self) -> None:
        """Raise SettingsError for what does not go together with the channels and the turns asked for."""
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given and len(given) != self.in_chans:
                raise SettingsError(f"{name} needs one number per channel, {self.in_chans} in all; got {len(given)}")
            if given and self.photographs:
                raise SettingsError(f"{name} needs --scale or --in_chans: photographs are normalised by ImageNet's")
        if any(value <= 0 for value in self.std):
            raise SettingsError(f"std must be positive, got {' '.join(map(str, self.std))}")
        able = self.pipeline in ("auto", "torch", "synthetic") and self.decode_on == "host"
        where = f"pipeline {self.pipeline}" if self.decode_on == "host" else "decoding on the device"
        if not able and not self.photographs:
            raise SettingsError(
                f"{where} reads only photographs, three channels of 8 bits: use pipeline torch for --in_chans"
                f" {self.in_chans} and --scale {self.scaling}"
            )
        if not able and (self.view.vflip or self.view.rot90):
            raise SettingsError(f"{where} supports neither --vflip nor --rot90: use pipeline torch")

    @property
    def photographs(self) -> bool:
        """See `are_photographs`."""
        return are_photographs(self.in_chans, self.scaling)

    @property
    def scale(self) -> str:
        """How stored numbers are scaled where they are no photographs: dtype, percentile or none."""
        return "dtype" if self.scaling == "auto" else self.scaling

    @property
    def expected(self) -> Expected:
        """What each file must be where they are no photographs."""
        return Expected(self.in_chans, self.max_pixels * MEGAPIXEL, self.channels_first, self.npz_key)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def on_device(self) -> bool:
        """Whether the device does what the host would do otherwise."""
        return "device" in (self.decode_on, self.augment_on)


def bytes_of(size: str) -> int:
    """The bytes of 500MB, 50GB, 1.5TB, 200GiB, or of a number alone. Raises SettingsError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", size.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise SettingsError(f"cache_size must be bytes with a unit, such as 500MB, 50GB or 1.5TB, got {size!r}")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
