"""Every setting of an evaluation, a tree a mode, as `spark_fast.training.settings`: defaults < --config < flags.

A setting of fine-tuning that is not given is the published recipe's for the network (`recipes`), so 0 is a value like
any other: `--mixup 0` switches it off.
"""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from tyro.conf import OmitArgPrefixes, arg

from spark_fast.errors import SettingsError
from spark_fast.evaluation.recipes import RECIPES, Recipe, recipe_for
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.run.config import Tree, nearest, read, switches_of
from spark_fast.run.loading import Loading

E = TypeVar("E", bound="Evaluation")


@dataclass
class Images:
    """The images and their normalisation."""

    data_path: str = ""
    """labelled training images: class folders (with train/ and val/), a file list with labels, shards or a .beton; or
    the URL of shards"""
    val_path: str = ""
    """validation images, if they are not in val/ of data_path"""
    pipeline: str = "auto"
    """auto (the fastest for the data), torch, dali, ffcv (both extras), or synthetic (random images: no input)"""
    input_size: str = "224"
    """pixels, N or HxW"""
    in_chans: int | None = None
    """channels of the images; default: those of the weights, or 3"""
    batch_size: Annotated[int | None, arg(aliases=["--bs"])] = None
    """images per step over all ranks; default: 256, or the recipe's"""
    crop_pct: float | None = None
    """side of the central crop as a share of the shorter side; default: 0.875 (224 of 256), or the recipe's"""
    scale: Literal["auto", "dtype", "percentile", "none"] = "auto"
    """how stored values are mapped to [0, 1]: dtype (by the type's largest value), percentile (0.1 to 99.9 become 0 to
    1), none; auto: as in the run of the weights"""
    mean: tuple[float, ...] = ()
    """mean of the scaled images, one number per channel; default: as in the run of the weights, or measured on up to
    1000 files"""
    std: tuple[float, ...] = ()
    """standard deviation of the scaled images, one number per channel; default: as for --mean"""
    channels_first: bool = False
    """arrays in .npy and .npz are (C, H, W), not (H, W, C)"""
    npz_key: str = ""
    """name of the array to read, for an .npz with several arrays"""


@dataclass
class Data(Loading, Images):
    """The images and how they reach the device."""


@dataclass
class Model:
    """The network and its weights."""

    weights: str = ""
    """a run folder, a checkpoint (published ones too), an exported encoder, an hf-hub: name; none: from scratch"""
    model: str = ""
    """a timm name, res50 ... cnxL, or your own as package.module:function; default: the network of the weights"""
    stages: int = 0
    """number of pre-trained pyramid levels; 0: as in the weights, or all"""


@dataclass
class Run:
    """Where the result goes and how it is computed."""

    exp_name: Annotated[str, arg(aliases=["--experiment_name"])] = ""
    """name of the evaluation; may also be given first, without a flag"""
    exp_dir: str = ""
    """its folder; default output_<exp_name>_<mode>"""
    seed: int = 0
    """decides order, crops and initial weights"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU"""
    threads: int = 0
    """CPU threads of the model; 0: as torch chooses"""
    timeout: float = 600.0
    """end the run after this many seconds without a step, and print where it is and which rank it waits for"""
    resume: ClassVar[str] = ""


@dataclass
class FinetuneRunSettings(Run):
    """Where the run lives and how it computes."""

    resume: Annotated[str, arg(aliases=["--resume_from"])] = ""  # type: ignore[misc]
    """resume from this checkpoint; auto: from the newest intact one of the folder, if there is any"""
    sync_batchnorm: Annotated[bool, arg(aliases=["--sbn"])] = True
    """batch statistics over all ranks"""
    log_every: int = 50
    """steps between log lines"""
    keep_last: int = 2
    """number of newest checkpoints to keep; 2 or more"""
    max_bad_steps: int = 3
    """steps whose loss or gradient is not finite are skipped; this many in a row end the run"""
    max_steps: int = 0
    """stop after this many steps of this process, as after Ctrl-C; 0: never"""


@dataclass
class Neighbours:
    """How neighbours vote."""

    k: int = 20
    """number of neighbours that vote"""
    temperature: float = 0.07
    """a vote has the weight exp(cosine similarity / temperature)"""


@dataclass
class Probe:
    """How the linear layer is trained."""

    epochs: Annotated[int, arg(aliases=["--ep"])] = 90
    """passes over the training images"""
    warmup_epochs: Annotated[int, arg(aliases=["--wp_ep"])] = 10
    """epochs of linear warm-up"""
    optimizer: Annotated[Literal["lars", "sgd", "adamw"], arg(aliases=["--opt"])] = "lars"
    """lars (as in MAE), sgd (momentum 0.9), adamw"""
    base_lr: float = 0.1
    """learning rate per 256 images: lr = base_lr * batch_size / 256"""
    weight_decay: Annotated[float, arg(aliases=["--wd"])] = 0.0
    """weight decay"""
    augment: bool = False
    """new random crops in every epoch, as in MAE, each a pass through the network; default: central crops, computed
    once"""


@dataclass
class Evaluation(Tree):
    """What all modes have."""

    mode: ClassVar[str]
    images: ClassVar[str] = "class folders, a file list with labels, or shards"
    data: OmitArgPrefixes[Data] = field(default_factory=Data)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)
    run: OmitArgPrefixes[Run] = field(default_factory=Run)

    def __init_subclass__(cls) -> None:
        cls.prog, cls.suffix = f"spark-fast-eval {cls.mode}", f"_{cls.mode}"

    def resolved(self: E, network: str, stages: int, in_chans: int | None = 3, known: Statistics | None = None) -> E:
        """With every value that was left open, now that the network is known, and the statistics of its run."""
        whole = deepcopy(self)
        whole.model.model, whole.model.stages, whole.data.in_chans = network, stages, in_chans
        if whole.data.batch_size is None:
            whole.data.batch_size = 256
        if whole.data.crop_pct is None:
            whole.data.crop_pct = 0.875
        return whole

    @property
    def is_shuffled(self) -> bool:
        """Whether the training images are shuffled in each epoch; else they are read once, in order."""
        return False

    @property
    def batch_size(self) -> int:
        """Of a resolved tree."""
        assert self.data.batch_size is not None
        return self.data.batch_size

    def shown(self) -> str:
        """The recipe with it, where the network is named."""
        known = self.resolved(self.network, self.model.stages, self.data.in_chans) if self.network else self
        return known.to_toml()

    def check(self) -> None:
        """Also what concerns weights."""
        super().check()
        if not self.model.weights:
            raise SettingsError("--weights is missing: a run folder, a checkpoint, an exported encoder, or none")
        if self.model.weights == "none" and not self.model.model:
            raise SettingsError("--model is missing: with --weights none nothing else names the network")
        if self.data.shuffle_block and not self.is_shuffled:
            raise SettingsError("--shuffle_block is for images that are shuffled: finetune, and linear with --augment")
        positive = {
            "batch_size",
            "in_chans",
            "workers",
            "prefetch",
            "max_pixels",
            "timeout",
            "k",
            "temperature",
            "epochs",
            "base_lr",
            "repeats",
        }
        self.check_numbers(
            positive | {"log_every", "max_bad_steps", "accumulate", "crop_pct", "min_scale"},
            {"crop_pct", "min_scale", "layer_decay", "erase"},
            {"smoothing", "ema", "drop_path"},
        )


@dataclass
class Knn(Evaluation):
    """Classify each image by its nearest neighbours (frozen features; nothing is trained)."""

    mode: ClassVar[str] = "knn"
    knn: OmitArgPrefixes[Neighbours] = field(default_factory=Neighbours)


@dataclass
class Linear(Evaluation):
    """Train one linear layer on frozen features."""

    mode: ClassVar[str] = "linear"
    probe: OmitArgPrefixes[Probe] = field(default_factory=Probe)

    @property
    def is_shuffled(self) -> bool:
        """Whether new crops are drawn in every epoch."""
        return self.probe.augment


@dataclass
class Finetune(Evaluation):
    """Train the whole network on labels, with the recipe published for it."""

    mode: ClassVar[str] = "finetune"
    run: OmitArgPrefixes[FinetuneRunSettings] = field(default_factory=FinetuneRunSettings)
    recipe: OmitArgPrefixes[Recipe] = field(default_factory=Recipe)

    HARMLESS: ClassVar[dict[str, set[str]]] = {  # what changes nothing that is computed, or only its rounding
        "data": {"data_path", "val_path", "pipeline", "workers", "prefetch", "max_bad_fraction", "max_pixels"}
        | {"worker_processes", "cache_dir", "cache_size"},
        "model": set(),
        "run": {f.name for f in dataclasses.fields(FinetuneRunSettings)} - {"seed"},
        "recipe": {"accumulate"},
    }

    def resolved(
        self, network: str, stages: int, in_chans: int | None = 3, known: Statistics | None = None
    ) -> Finetune:
        """With the recipe of the network."""
        whole = super().resolved(network, stages, in_chans)
        photographs = whole.photographs(known)
        batch_size, crop_pct, recipe = recipe_for(network, self.size, photographs)
        whole.data.batch_size = self.data.batch_size or batch_size
        whole.data.crop_pct = self.data.crop_pct or crop_pct
        given = {k: v for k, v in dataclasses.asdict(self.recipe).items() if v is not None}
        whole.recipe = dataclasses.replace(recipe, **given)
        if not photographs and whole.recipe.augment != "none":
            raise SettingsError(
                f"--augment {whole.recipe.augment} is for photographs, and the images have {whole.in_chans} "
                f"channel{'s' * (whole.in_chans != 1)} and --scale {whole.scaling(known)}: use --augment none"
            )
        return whole

    @property
    def is_shuffled(self) -> bool:
        """Always."""
        return True

    @property
    def whole_recipe(self) -> Any:
        """The recipe of a resolved tree, where no field is None: the type cannot say so."""
        return self.recipe

    def meaning(self) -> dict:
        """The same as `to_dict`, each value spelled in one way."""
        tree = self.to_dict()
        tree["data"]["input_size"] = "{}x{}".format(*self.size)
        return tree


MODES: dict[str, type[Evaluation]] = {"knn": Knn, "linear": Linear, "finetune": Finetune}
SWITCHES = switches_of("augment", "sync_batchnorm", "sbn", "channels_first")


def parse(argv: list[str]) -> Evaluation:
    """Settings from a command line, MODE [NAME] --flag ...; raises what `read` raises."""
    if not argv or argv[0] in ("--help", "-h"):
        print(
            "usage: spark-fast-eval MODE NAME --data_path ... --weights ...   (--help after a mode lists its settings)"
        )
        for name, kind in MODES.items():
            print(f"  {name:10}{(kind.__doc__ or '').strip()}")
        print(f"  recipes are known for {', '.join(RECIPES)}")
        raise SystemExit(0 if argv else 2)
    mode = argv[0]
    if mode not in MODES:
        raise SettingsError(f"the first word must be a mode, got {mode!r}{nearest(mode, MODES)}")
    return read(MODES[mode], argv[1:], SWITCHES)
