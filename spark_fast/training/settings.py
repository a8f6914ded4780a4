"""Every setting of a run, typed, in one tree: defaults < `--config file.toml` < flags.

`run.config` reads it, with tyro. The spellings of the published script are aliases.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from tyro.conf import OmitArgPrefixes, arg

from spark_fast.errors import SettingsError
from spark_fast.method import Method, method_class
from spark_fast.networks import import_from_current_folder
from spark_fast.reporting.reconstructions import check_picture_channels
from spark_fast.run.config import Tree, last_value, read, set_by_name, switch, switches_of
from spark_fast.run.loading import Loading

PUBLISHED_DROP_PATH = {
    "resnet50": 0.05,
    "resnet101": 0.08,
    "resnet152": 0.10,
    "resnet200": 0.15,
    "convnext_small": 0.2,
    "convnext_base": 0.3,
    "convnext_large": 0.4,
}
PUBLISHED_WARMUP = 40  # epochs, of 1600
STORED_FORMAT = 2

Compile = Literal["off", "default", "max-autotune", "reduce-overhead"]


@dataclass
class Images:
    """The images and their augmentation."""

    data_path: str = ""
    """image folder (ImageNet layout or flat), file list, shards or a .beton written by spark-fast-convert, or the URL
    of shards: s3://, gs://, https:// (extra remote)"""
    val_path: str = ""
    """labelled images for --eval_every: a folder with train/ and val/, or one set, whose every 5th image per class is
    classified by the others"""
    pipeline: str = "auto"
    """auto (the fastest for the data), torch, dali, ffcv (both extras), or synthetic (random images: no input)"""
    ffcv_resize: Literal["bicubic", "area"] = "bicubic"
    """how --pipeline ffcv resizes: bicubic like all other pipelines, or FFCV's own area"""
    decode: Literal["host", "device"] = "host"
    """where JPEGs are decoded; device: by nvJPEG, and the augmentation runs there, too (--pipeline torch)"""
    augment: Literal["host", "device"] = "host"
    """where crops are resized, flipped and normalised; device takes this work off the host (--pipeline torch)"""
    input_size: str = "224"
    """pixels, N or HxW; a multiple of the network's total stride"""
    in_chans: int = 3
    """channels of the images"""
    min_crop: float = 0.67
    """smallest share of an image's area in a random crop; the largest is 1"""
    crop_scale: tuple[float, ...] = ()
    """smallest and largest share of an image's area in a random crop, LOW HIGH; default: --min_crop and 1"""
    hflip: bool = True
    """flip half of the crops horizontally; `--no_hflip` flips none"""
    vflip: bool = False
    """flip half of the crops vertically, for images without an up (--pipeline torch)"""
    rot90: bool = False
    """rotate the crops by 0 to 3 quarter turns, for images without an up (--pipeline torch)"""
    scale: Literal["auto", "dtype", "percentile", "none"] = "auto"
    """how stored values are mapped to [0, 1]: dtype (by the type's largest value), percentile (0.1 to 99.9 become 0 to
    1), none; auto: 8-bit RGB for three channels, dtype for others"""
    mean: tuple[float, ...] = ()
    """mean of the scaled images, one number per channel; default: measured on up to 1000 files"""
    std: tuple[float, ...] = ()
    """standard deviation of the scaled images, one number per channel; default: as for --mean"""
    channels_first: bool = False
    """arrays in .npy and .npz are (C, H, W), not (H, W, C)"""
    npz_key: str = ""
    """name of the array to read, for an .npz with several arrays"""
    batch_size: Annotated[int, arg(aliases=["--bs"])] = 4096
    """images per step over all ranks"""


@dataclass
class Data(Loading, Images):
    """The images and how they reach the device."""


@dataclass
class Model:
    """The network, the method, and what is hidden."""

    method: str = "spark"
    """spark, fcmae (ConvNeXt V2), or your own as package.module:Class; it sets the defaults of other settings"""
    model: str = "resnet50"
    """a timm name, res50 res101 res152 res200 cnxS cnxB cnxL, or your own as package.module:function"""
    stages: int = 0
    """number of pyramid levels to keep, from stride 4 upwards: 3 gives patches of 16 px, 2 gives 8 px; 0: all"""
    mask_ratio: Annotated[float, arg(aliases=["--mask"])] = 0.6
    """share of hidden patches"""
    drop_path: Annotated[float | Literal["auto"], arg(aliases=["--dp"])] = "auto"
    """stochastic depth; 0: none; auto: the published rate of the model"""
    masks_per_image: int = 1
    """masks per loaded image, all in one batch; no patch is visible in two of them"""
    decoder_width: int = 768
    """channels of the decoder at its coarsest level"""
    decoder_depth: int = 1
    """blocks of the decoder (fcmae)"""
    encoder: Literal["packed", "masked", "sparseconvnet"] = "packed"
    """packed (only the visible patches), masked (dense, as published), or sparseconvnet (optional install)"""
    verify: Literal["auto", "always", "never"] = "auto"
    """check at the start that the packed network equals the original; auto: unless it is in the table of verified
    networks"""
    sparse_conv: bool = False
    """the flag of the published code for --encoder sparseconvnet"""
    init_weight: str = ""
    """start from the weights of a run folder, a checkpoint (published ones too), an encoder, or an hf-hub: name"""


@dataclass
class Optim:
    """The optimiser and its schedule."""

    epochs: Annotated[int, arg(aliases=["--ep"])] = 1600
    """passes over the data"""
    warmup_epochs: Annotated[int | Literal["auto"], arg(aliases=["--wp_ep"])] = "auto"
    """epochs of linear warm-up; auto: 40 as published, but at most a tenth of --epochs"""
    base_lr: float = 2e-4
    """learning rate per 256 images: lr = base_lr * batch_size / 256"""
    optimizer: Annotated[Literal["lamb", "adamw", "sgd"], arg(aliases=["--opt"])] = "lamb"
    """lamb (published), adamw or sgd"""
    beta2: Annotated[float, arg(aliases=["--ada"])] = 0.0
    """decay of the second moment; 0: 0.95 for ResNets, 0.999 for other networks"""
    weight_decay: Annotated[float, arg(aliases=["--wd"])] = 0.04
    """weight decay at the start"""
    weight_decay_end: Annotated[float, arg(aliases=["--wde"])] = 0.2
    """weight decay at the end; 0: as at the start"""
    clip: float = 5.0
    """clip the total gradient norm to this value; 0: no clipping"""
    accumulate: int = 1
    """backward passes per step; the batch of each rank is split into that many parts"""
    allreduce: Literal["fp32", "bf16"] = "fp32"
    """precision of the gradient exchange between ranks; bf16 halves the bytes"""
    zero: bool = False
    """ZeRO-1: shard the optimiser's state over the ranks, for large networks"""
    max_bad_steps: int = 3
    """steps whose loss or gradient is not finite are skipped; this many in a row end the run"""


@dataclass
class Run:
    """Where the run lives and how it computes."""

    exp_name: Annotated[str, arg(aliases=["--experiment_name"])] = ""
    """name of the experiment; may also be given first, without a flag"""
    exp_dir: str = ""
    """run folder; default output_<exp_name>"""
    resume: Annotated[str, arg(aliases=["--resume_from"])] = ""
    """resume from this checkpoint, of spark_fast or a full published one; auto: from the newest intact one of the run
    folder, if there is any"""
    seed: int = 0
    """decides order, crops, masks and initial weights"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU"""
    compile: Compile = "off"
    """mode of torch.compile for the model (the first step takes a minute); without a value: default"""
    cuda_graph: bool = False
    """replay the whole step as one CUDA graph: one GPU, LAMB or AdamW, no accumulation"""
    sync_batchnorm: Annotated[bool, arg(aliases=["--sbn"])] = True
    """batch statistics over all ranks"""
    threads: int = 0
    """CPU threads of the model; 0: as torch chooses"""
    log_every: int = 50
    """steps between log lines"""
    save_every: str = "0"
    """extra checkpoints within an epoch, every 500 (steps) or 10min (at the next log line); 0: only at its end"""
    keep_last: int = 2
    """number of newest checkpoints to keep; 2 or more"""
    keep_every: int = 0
    """keep the checkpoint of every Nth epoch permanently; 0: none"""
    picture_every: int = 1
    """epochs between reconstruction pictures; 0: none"""
    eval_every: int = 0
    """epochs between k-NN evaluations on --val_path, also before the first and after the last step; 0: none"""
    picture_channels: tuple[int, ...] = ()
    """three channels to show as red, green and blue, or one to show as grey; default: the first three, or the first"""
    timeout: float = 600.0
    """end the run after this many seconds without a step, and print where it is and which rank it waits for"""
    max_steps: int = 0
    """stop after this many steps of this process, as after Ctrl-C; 0: never"""
    wandb: str = ""
    """also log to this Weights & Biases project (extra wandb); empty: no"""
    dry_run: bool = False
    """build everything, take two steps, print what the run would cost, and exit; nothing is written"""
    profile: bool = False
    """record steps 5 to 8 of this process with torch's profiler, into the run folder; training continues"""

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):  # as checkpoints of earlier versions have it
            self.compile = "default" if self.compile else "off"


@dataclass
class Settings(Tree):
    """Pre-train a ConvNet by masked image modelling (SparK or FCMAE)."""

    data: OmitArgPrefixes[Data] = field(default_factory=Data)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)
    optim: OmitArgPrefixes[Optim] = field(default_factory=Optim)
    run: OmitArgPrefixes[Run] = field(default_factory=Run)
    prog: ClassVar[str] = "spark-fast-train"
    images: ClassVar[str] = "an image folder, a file list or shards"

    @property
    def encoder(self) -> str:
        """The encoder, by either of its flags."""
        return "sparseconvnet" if self.model.sparse_conv else self.model.encoder

    @property
    def drop_path(self) -> float:
        """Stochastic depth, the published rate unless chosen."""
        chosen = self.model.drop_path
        return PUBLISHED_DROP_PATH.get(self.network, 0.0) if chosen == "auto" else chosen

    @property
    def warmup_epochs(self) -> float:
        """Epochs of linear warm-up; the published 40 unless chosen, and then at most a tenth of the run."""
        chosen = self.optim.warmup_epochs
        return min(PUBLISHED_WARMUP, self.optim.epochs / 10) if chosen == "auto" else chosen

    @property
    def beta2(self) -> float:
        """Second moment's decay, the published one unless chosen."""
        return self.optim.beta2 or (0.95 if "resnet" in self.network else 0.999)

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Smallest and largest share of an image's area that a random crop takes."""
        low, high = self.data.crop_scale or (self.data.min_crop, 1.0)
        return low, high

    @property
    def peak_lr(self) -> float:
        """Base rate times batch / 256 (published rule)."""
        return self.optim.base_lr * self.data.batch_size / 256

    @property
    def save_every(self) -> tuple[int, float]:
        """(steps, seconds) between checkpoints; at most one of them is not 0."""
        match = re.fullmatch(r"(\d+)(min)?", self.run.save_every)
        if match is None:
            raise SettingsError(f"--save_every must be steps (500) or minutes (10min), got {self.run.save_every!r}")
        return (0, int(match[1]) * 60.0) if match[2] else (int(match[1]), 0.0)

    def check(self) -> None:
        """Also what concerns pre-training."""
        super().check()
        _ = self.save_every
        if self.run.resume and self.model.init_weight:
            raise SettingsError("--resume continues a run, --init_weight starts a new one: choose one of them")
        if self.model.sparse_conv and self.model.encoder == "masked":
            raise SettingsError("--sparse_conv=1 and --encoder masked contradict each other: choose one of them")
        if self.run.compile == "reduce-overhead" and (self.run.cuda_graph or self.optim.accumulate > 1):
            raise SettingsError(
                "--compile reduce-overhead makes CUDA graphs of its own, and works neither with --cuda_graph nor with "
                "--accumulate: use --compile or --compile max-autotune"
            )
        if not 0 < self.model.mask_ratio < 1:
            raise SettingsError(f"--mask_ratio must be between 0 and 1, got {self.model.mask_ratio}")
        for name, value in (("drop_path", self.model.drop_path), ("beta2", self.optim.beta2)):
            if not isinstance(value, str) and not 0 <= value < 1:
                raise SettingsError(f"--{name} must be at least 0 and below 1, got {value}")
        _ = method_of(self.model.method)
        positive = {"batch_size", "workers", "prefetch", "max_pixels", "decoder_width", "epochs", "base_lr", "min_crop"}
        positive |= {"accumulate", "log_every", "max_bad_steps", "timeout", "decoder_depth", "masks_per_image"}
        positive |= {"in_chans"}
        self.check_numbers(positive, up_to_one={"min_crop"})
        if self.run.eval_every and not self.data.val_path:
            raise SettingsError(f"--eval_every {self.run.eval_every} needs --val_path: labelled images to evaluate on")
        if self.data.val_path and not self.run.eval_every:
            raise SettingsError(f"--val_path {self.data.val_path} needs --eval_every, the epochs between evaluations")
        if (crop := self.data.crop_scale) and not (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1):
            raise SettingsError(f"--crop_scale takes two numbers, 0 < LOW <= HIGH <= 1, got {' '.join(map(str, crop))}")
        check_picture_channels(self.run.picture_channels, self.in_chans)

    def meaning(self) -> dict:
        """The same as `to_dict`, each value spelled in one way: two settings that mean one run are equal here."""
        tree = self.to_dict()
        low, high = self.crop_scale
        tree["data"] |= {"input_size": "{}x{}".format(*self.size), "min_crop": low, "crop_scale": (low, high)}
        tree["model"] |= {"model": self.network, "encoder": self.encoder, "drop_path": self.drop_path}
        tree["optim"] |= {"beta2": self.beta2, "warmup_epochs": self.warmup_epochs}
        tree["optim"]["weight_decay_end"] = self.optim.weight_decay_end or self.optim.weight_decay
        return tree

    def stored(self) -> dict:
        """What a checkpoint keeps, for `from_dict`."""
        return {**self.to_dict(), "format": STORED_FORMAT}

    @classmethod
    def from_names(cls, **given: object) -> Settings:
        """Settings from their names alone, whatever group they are in; checked as the command's are.

        Raises:
            TypeError: a name that is no setting, with the nearest ones.
            SettingsError: a value that cannot be used.
        """
        method = given.get("method", "spark")
        settings = cls.of_method(method) if isinstance(method, str) else cls()
        set_by_name(settings, given)
        settings.check()
        return settings

    @classmethod
    def of_method(cls, name: str) -> Settings:
        """The defaults of a method. Raises SettingsError for an unknown one."""
        settings = cls()
        set_by_name(settings, {"method": name, **method_of(name).recipe.settings})
        return settings

    @classmethod
    def from_dict(cls, tree: Mapping[str, Mapping[str, object]]) -> Settings:
        """What `stored` gave; settings that it lacks are the defaults (an older version knew fewer).

        Before format 2 a drop_path of 0 stood for the published rate.

        Raises:
            TypeError: it has a setting that this version does not know.
        """
        found = cls(**{f.name: type(getattr(cls(), f.name))(**tree.get(f.name, {})) for f in dataclasses.fields(cls)})
        if "format" not in tree and found.model.drop_path == 0:
            found.model.drop_path = "auto"
        return found


SWITCHES = switches_of("sparse_conv", "zero", "cuda_graph", "sync_batchnorm", "sbn", "dry_run", "profile")
SWITCHES |= switches_of("hflip", "vflip", "rot90", "channels_first")
# was a switch once, and names a mode now
SWITCHES["--compile"] = switch("--compile=default", "--compile=off") | {m: f"--compile={m}" for m in get_args(Compile)}
SWITCHES["--no_compile"] = {None: "--compile=off"}


def parse(argv: list[str]) -> Settings:
    """Settings from a command line; raises what `read` raises."""

    def defaults(words: list[str]) -> Settings:
        method = last_value(words, "--method", "spark")
        import_from_current_folder(method)
        return Settings.of_method(method)

    return read(Settings, argv, SWITCHES, defaults)


def method_of(name: str) -> type[Method]:
    """The class of a method. Raises SettingsError for an unknown one."""
    try:
        return method_class(name)
    except ValueError as error:
        raise SettingsError(f"--method: {error}") from error
