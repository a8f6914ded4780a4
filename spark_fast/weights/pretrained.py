"""A checkpoint as a model, whoever wrote it: a run folder, a file of ours, a published one, or an encoder alone.

Ours hold their settings. The others are told by the network that a file names, or else by the shapes of their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from spark_fast.checkpoint.file import read
from spark_fast.checkpoint.manager import candidates, read_newest
from spark_fast.checkpoint.state_dict import strip_prefixes, tensors_of
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.networks import PUBLISHED_MODELS, build_network
from spark_fast.spark import SparK, build_spark
from spark_fast.training.settings import Settings
from spark_fast.weights.load import fit
from spark_fast.weights.spark_keys import encoder_name

# what a file without a name may be of, by shapes: networks that were published pre-trained, and their small relatives
RECOGNISED = ("resnet18", "resnet34", "convnext_tiny", *PUBLISHED_MODELS.values())
RECORD = ("step", "epoch", "loss", "versions")
UNUSED_WIDTH = 128  # of the decoder that a model gets where the file has none


@dataclass(frozen=True)
class Pretrained:
    """A model with pre-trained weights, and what is known of them.

    Attributes:
        path: the file that was read.
        settings: those of its run; of a published file only the network, the input and the decoder's width are known.
        model: on the host, fp32, in evaluation mode.
        has_decoder: False when the file holds an encoder alone, and the decoder is a new one.
        record: of a checkpoint of ours: step, epoch, loss, versions; else empty.
        folder: the run folder that it lies in, None where it was taken out of it.
    """

    path: Path
    settings: Settings
    model: SparK
    has_decoder: bool
    record: dict[str, Any]
    folder: Path | None


def open_pretrained(source: Path, network: str = "", input_size: str = "") -> Pretrained:
    """Read a checkpoint and build the model it is of.

    Args:
        source: a run folder (its newest checkpoint that is whole), or a .pth or .safetensors file.
        network: as --model of training, where the file does not tell. Your own network, `package.module:function`,
            must be named here: code is imported because you say so, never because a file does.
        input_size: "N" or "HxW" pixels instead of the checkpoint's (or of 224, where it has none).

    Raises:
        CheckpointError: there is none, it cannot be read, its network is unknown, or it does not fit.
        SettingsError: a network or an input size that cannot be used.
    """
    path, content = _read(source)
    ours = isinstance(content.get("settings"), Mapping)
    settings = _own_settings(path, content["settings"]) if ours else _told_settings(path, content, network)
    if ":" in settings.network and not network:
        raise SettingsError(f"{path} is of your own network: say --model {settings.network} to have it imported")
    settings.model.model = network or settings.model.model
    settings.data.input_size = input_size or settings.data.input_size
    try:
        model = new_model(settings)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
    has_decoder = fit(path, content, model)
    record: dict[str, Any] = {k: content[k] for k in RECORD if ours and k in content}
    return Pretrained(path, settings, model.eval(), has_decoder, record, _run_folder(path))


def new_model(settings: Settings) -> SparK:
    """The model of these settings, on the host, without the pre-trained weights. Raises ValueError as `build_spark`."""
    return build_spark(
        settings.network,
        input_size=settings.size,
        mask_ratio=settings.model.mask_ratio,
        decoder_width=settings.model.decoder_width,
        stages=settings.model.stages or None,
        check=False,  # it was, before the training
    )


def _read(source: Path) -> tuple[Path, dict[str, Any]]:
    if not source.is_dir():
        return source, read(source)
    found = candidates(source)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {source}: give a run folder, or a .pth or .safetensors file")
    return read_newest(found)


def _run_folder(path: Path) -> Path | None:
    return next((p for p in list(path.absolute().parents)[:2] if (p / "config.toml").is_file()), None)


def _own_settings(path: Path, tree: dict[str, Any]) -> Settings:
    try:
        settings = Settings.from_dict(tree)
        settings.meaning()
    except (TypeError, AttributeError, ValueError, SettingsError) as error:
        raise CheckpointError(f"{path} has settings that this version cannot read ({error})") from None
    return settings


def _told_settings(path: Path, content: Mapping, network: str) -> Settings:
    """What can be told of a file that holds no settings."""
    state = {strip_prefixes(str(k)): v for k, v in tensors_of(content).items() if isinstance(v, Tensor)}
    settings = Settings()
    settings.model.model = network or _named(path, content) or recognise(state)
    if not settings.model.model:
        known = ", ".join(sorted({*RECOGNISED}))
        raise CheckpointError(f"{path}: its network is none of {known}: name it with --model")
    if isinstance(content.get("input_size"), int):
        settings.data.input_size = str(content["input_size"])
    first = next((v for k, v in state.items() if k.endswith("decoder.dec.0.up_sample.weight")), None)
    settings.model.decoder_width = UNUSED_WIDTH if first is None else len(first)  # (width, width, 4, 4)
    return settings


def _named(path: Path, content: Mapping) -> str:
    """The network of timm that a file names: the published code as "arch", an exported encoder in its metadata."""
    name = content.get("arch")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("architecture")
    name = PUBLISHED_MODELS.get(str(name), str(name))
    return name if timm.is_model(name) else ""


def recognise(state: Mapping[str, Tensor]) -> str:
    """Which of the networks in RECOGNISED these tensors are of; "" for none.

    The largest one whose every tensor is there: the layers of resnet50 are also in resnet101.
    """
    shapes = {encoder_name(k.removeprefix("sparse_encoder.sp_cnn.")): tuple(v.shape) for k, v in state.items()}
    sizes = {name: len(wanted) for name in RECOGNISED if (wanted := _shapes(name)).items() <= shapes.items()}
    return max(sizes, key=sizes.__getitem__, default="")


@cache
def _shapes(network: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {encoder_name(k): tuple(v.shape) for k, v in build_network(network).state_dict().items()}
