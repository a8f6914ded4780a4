"""The settings of `learning.py`, and its forms: their values for two cores, for one GPU, and for a test of seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from spark_fast.run.config import take_option

Part = Literal["sweep", "main", "ablations", "decoder", "evidence"]


@dataclass
class Options:
    """What is run; the defaults are those of the form."""

    data: Annotated[Path, tyro.conf.arg(help="a tar, or a folder, of class folders in train/ and test/")]
    out: Annotated[Path, tyro.conf.arg(help="where the data are converted, and runs are kept until all are done")]
    form: str
    """cpu and evidence... (two cores), gpu and evidence_gpu (one), or smoke (seconds)"""
    networks: tuple[str, ...]
    """functions of learning_networks"""
    epochs: int
    """of pre-training"""
    shares: tuple[float, ...]
    """of the training images that have labels; the first one serves ablations, decoder and sweep"""
    tune_epochs: tuple[int, ...]
    """of fine-tuning, for each share"""
    scratch_lr: tuple[float, ...] = ()
    """learning rate of fine-tuning, for each share, from scratch; evidence chooses its own"""
    pretrained_lr: tuple[float, ...] = ()
    """the same after pre-training"""
    ablation_epochs: int = 1
    """of pre-training in the ablations and of the decoder's widths"""
    ablation_images: float = 1.0
    """share of the training images that those see"""
    parts: tuple[Part, ...] = ("main", "ablations", "decoder")
    seeds: int = 3
    """fine-tunings of each kind: labelled images, order, crops, the linear layer, and without weights all of them"""
    pretrainings: int = 1
    """of each kind, with seeds of their own, which the fine-tunings share out"""
    batch: int = 128
    """images per step of pre-training"""
    base_lr: float = 4e-3
    """of pre-training, per 256 images"""
    optimizer: Literal["lamb", "adamw"] = "lamb"
    """of pre-training"""
    width: int = 96
    """of the decoder"""
    widths: tuple[int, ...] = (192, 96, 48)
    """of the decoder, to compare"""
    masks: tuple[float, ...] = (0.25, 0.9)
    """shares of masked patches beside 0.6"""
    tune_batch: int = 128
    """images per step of fine-tuning"""
    min_scale: float = 0.5
    """least share of an image that a crop has in fine-tuning"""
    sweep_lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
    """learning rates to try"""
    step_repeats: int = 9
    """steps timed of each kind"""
    pretrain_lr: tuple[float, ...] = (3e-3, 8e-3, 2e-2)
    """evidence: learning rates of pre-training to try for each arm, per 256 images"""
    trial_epochs: int = 1
    """evidence: of the pre-trainings that try them"""
    fcmae_width: int = 64
    """evidence: of FCMAE's decoder"""
    points: int = 5
    """evidence: k-NN along the runs that are drawn against seconds, so often"""
    neighbours: float = 0.1
    """evidence: share of the training images that are the neighbours"""
    arms: tuple[str, ...] = ()
    """evidence: of `learning_plan`, those that are run; none named: all"""
    channels: int = 3
    """of the images; 3: photographs"""
    mean: tuple[float, ...] = ()
    """of images that are no photographs, scaled by their type, a number a channel"""
    std: tuple[float, ...] = ()
    """their deviation, likewise"""
    minutes: float = 0.0
    """leave after so long, saving what is under way; 0: when all is done"""
    precision: str = "auto"
    """bf16, fp32 or auto"""
    processes: int = 1
    """runs side by side, which share the CPU's cores: small networks leave cores idle that work on one batch"""
    workers: int = 2
    """decoding threads of a run"""
    in_memory: bool = False
    """decode the images once, all of one size, and hold them in the device's memory"""
    write: Path | None = None
    """a page of the docs, into which the table is put between its two marks"""


# what all runs have in common; all else is in the name of each, so that a sweep and what it decides share their runs
SHARED = ("batch", "base_lr", "optimizer", "tune_batch", "min_scale", "precision")
EVIDENCE = {
    "networks": ("small_convnext",),
    "parts": ("evidence",),
    "epochs": 10,
    "shares": (0.01, 0.1),
    "tune_epochs": (30, 10),
    "pretrainings": 3,
    "batch": 128,
    "optimizer": "adamw",
    "tune_batch": 64,
    "width": 32,
    "widths": (64, 32, 16),
    "masks": (0.25, 0.9, 0.75),
    "sweep_lr": (3e-3, 1e-2, 2e-2),
    "precision": "bf16",
    "processes": 2,
    "workers": 1,
}
FORMS: dict[str, dict[str, Any]] = {
    "cpu": {
        "networks": ("small_resnet", "small_convnext"),
        "epochs": 3,
        "ablation_epochs": 1,
        "ablation_images": 0.4,
        "shares": (0.01, 0.1, 1.0),
        "tune_epochs": (30, 5, 1),
        "scratch_lr": (1e-2,) * 3,
        "pretrained_lr": (1e-2,) * 3,
        "precision": "bf16",
        "width": 32,
        "widths": (64, 32, 16),
        "batch": 64,
        "base_lr": 1e-2,
        "optimizer": "adamw",
        "tune_batch": 64,
        "processes": 2,
        "workers": 1,
    },
    "gpu": {
        "networks": ("wide_resnet", "wide_convnext"),
        "epochs": 40,
        "ablation_epochs": 10,
        "ablation_images": 1.0,
        "shares": (0.01, 0.1, 1.0),
        "tune_epochs": (60, 20, 5),
        "scratch_lr": (1e-3,) * 3,
        "pretrained_lr": (1e-3,) * 3,
        "batch": 512,
        "width": 384,
        "widths": (768, 384, 192),
        "workers": 15,
    },
    "evidence": EVIDENCE,
    "evidence_scans": EVIDENCE
    | {
        "networks": ("small_convnext_grey",),
        "arms": ("scratch", "as published", "zero-outing", "FCMAE"),
        "channels": 1,
        "mean": (0.5,),
        "std": (0.094,),
        "pretrain_lr": (8e-3, 2e-2, 5e-2),  # higher ones than for photographs: the best was at the end of that grid
        "sweep_lr": (1e-2, 2e-2, 4e-2),
        "min_scale": 0.9,  # half an image, enlarged, has the grain of another class
    },
    "evidence_resnet18": EVIDENCE | {"networks": ("half_resnet18",), "arms": ("scratch", "as published")},
    "evidence_gpu": EVIDENCE
    | {
        "arms": (
            "scratch", "as published", "zero-outing", "FCMAE", "no hierarchy", "loss on all patches", "mask 0.25",
            "mask 0.9", "FCMAE, SparK's seconds", "FCMAE x 4, SparK's seconds",
        ),
        "epochs": 100,
        "trial_epochs": 5,
        "batch": 1024,
        "pretrain_lr": (7.5e-4, 2e-3, 5e-3),
        "processes": 8,
        "workers": 2,
        "in_memory": True,
        "minutes": 8.0,
    },
    "smoke": {
        "networks": ("small_convnext",),
        "epochs": 1,
        "ablation_epochs": 1,
        "ablation_images": 1.0,
        "shares": (0.5,),
        "tune_epochs": (1,),
        "scratch_lr": (1e-3,),
        "pretrained_lr": (1e-3,),
        "pretrain_lr": (1e-3, 2e-3),
        "fcmae_width": 8,
        "points": 1,
        "neighbours": 1.0,
        "seeds": 2,
        "batch": 8,
        "width": 8,
        "widths": (16, 8),
        "masks": (0.9,),
        "tune_batch": 4,
        "sweep_lr": (1e-3,),
        "step_repeats": 1,
        "workers": 1,
    },
}  # fmt: skip


def parse(argv: list[str], description: str | None = None) -> Options:
    """The options, with the form's defaults."""
    form, rest = take_option(argv, "--form")
    form = form or "cpu"
    if form not in FORMS:
        raise SystemExit(f"--form {form}: there are {', '.join(FORMS)}")
    default = Options(data=tyro.MISSING, out=tyro.MISSING, form=form, **FORMS[form])
    return tyro.cli(Options, args=rest, default=default, description=description, use_underscores=True)
