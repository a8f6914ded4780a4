"""The formats in which weights are exported: for timm, torchvision, a Hugging Face folder, SparK's published code.

A file is written beside its place, loaded strictly into a new network by the reader's own function, and compared
tensor by tensor. Only then is it moved to its place.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn

from spark_fast.checkpoint.file import read
from spark_fast.checkpoint.state_dict import load_strictly
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.files import atomic_write, sync_folder
from spark_fast.networks import PUBLISHED_MODELS, build_network, timm_channels
from spark_fast.spark import SparK
from spark_fast.weights.load import load_into_spark, load_spark_state_dict
from spark_fast.weights.load_pretrained import Pretrained
from spark_fast.weights.model_card import model_card
from spark_fast.weights.model_spec import ModelSpec
from spark_fast.weights.read import read_weights
from spark_fast.weights.spark_keys import published_encoder, spark_state_dict
from spark_fast.weights.timm_keys import encoder_state_dict, safetensors_metadata, timm_names
from spark_fast.weights.torchvision_keys import torchvision_names

log = logging.getLogger("spark_fast")

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class ExportFormat:
    """Weights in one format, ready to be written.

    Attributes:
        state: what is written.
        new: names in `state` that were not pre-trained, at their initial values (a final norm, a classifier).
        endings: of the file, the first by preference; () for a folder.
        load: reads what was written, strictly, into a new network, and returns its state under the names of `state`.
        usage: Python that loads it, with PATH for the place.
        whole: what a .pth holds where that is more than `state`.
    """

    state: StateDict
    new: list[str]
    endings: tuple[str, ...]
    load: Callable[[Path], StateDict]
    usage: str
    whole: dict[str, object] | None = None


def export(source: Pretrained, to: str, out: Path) -> ExportFormat:
    """Write weights to `out` and a model card beside it (README.md in a folder), all of it checked, or nothing.

    Args:
        to: one of EXPORT_FORMATS.

    Raises:
        SettingsError: an unknown format, a place that is taken or does not suit it, a network that the format lacks.
        CheckpointError: the file system refuses, or what was written does not load as it should.
    """
    if to not in EXPORT_FORMATS:
        raise SettingsError(f"unknown export format {to!r}: choose one of {', '.join(EXPORT_FORMATS)}")
    try:
        made = EXPORT_FORMATS[to](source)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if made.endings and out.suffix not in made.endings:
        raise SettingsError(f"{out} must end with {' or '.join(made.endings)} for --to {to}")
    card = out / "README.md" if not made.endings else out.with_name(f"{out.name}.README.md")
    for place in (out, card):
        if place.exists():
            raise SettingsError(f"{place} already exists: remove it, or choose another path")
    if not out.parent.is_dir():
        raise SettingsError(f"cannot write {out}: there is no folder {out.parent}")
    try:
        with TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            _write(source, to, made, Path(folder) / out.name, Path(folder) / card.relative_to(out.parent))
            _check_loads(made, Path(folder) / out.name, out)
            (Path(folder) / out.name).replace(out)
            if made.endings:
                (Path(folder) / card.name).replace(card)
        sync_folder(out.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        raise CheckpointError(f"cannot write {out}: {error}") from error
    if (stages := source.spec.stages) and out.suffix == ".pth" and to != "spark":  # that one is read by its decoder
        text = "%s cannot say that only the first %d levels were pre-trained: give spark-fast-eval --stages %d with it"
        log.warning(text, out, stages, stages)
    return made


def _write(source: Pretrained, to: str, made: ExportFormat, path: Path, card: Path) -> None:
    if not made.endings:
        path.mkdir()
        config = json.dumps(_timm_config(source), indent=2) + "\n"
        with atomic_write(path / "config.json") as file:
            file.write(config.encode())
    weights = path if made.endings else path / "model.safetensors"
    if weights.suffix == ".safetensors":
        content = save(made.state, metadata=safetensors_metadata(source.spec.network, source.spec.stages, made.new))
        with atomic_write(weights) as file:
            file.write(content)
    else:
        memory = io.BytesIO()  # of a full disk torch.save itself says no more than "unexpected pos"
        torch.save(made.whole or made.state, memory)
        with atomic_write(weights) as file:
            file.write(memory.getbuffer())
    text = model_card(source, to, made.new, made.usage.replace("PATH", path.name))
    with atomic_write(card) as file:
        file.write(text.encode())


def _check_loads(made: ExportFormat, path: Path, out: Path) -> None:
    try:
        loaded = made.load(path)
    except (RuntimeError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{out} was not written, because it could not be loaded: {error}") from error
    wrong = [k for k in {**made.state, **loaded} if not _same(made.state.get(k), loaded.get(k))]
    if wrong:
        raise CheckpointError(
            f"{out} was not written, because these tensors change when it is loaded: {', '.join(wrong[:3])}"
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _timm(source: Pretrained) -> ExportFormat:
    name = _of_timm(source, "timm")
    kwargs = {**timm_channels(source.spec.in_chans), "num_classes": 0}
    state, new = _completed(encoder_state_dict(source.model, name), lambda: timm.create_model(name, **kwargs))

    def load(path: Path) -> StateDict:
        return timm.create_model(name, **kwargs, checkpoint_path=str(path)).state_dict()

    given = ", ".join(f"{k}={v}" for k, v in kwargs.items())
    usage = f'import timm\n\nnetwork = timm.create_model("{name}", {given}, checkpoint_path="PATH")'
    return ExportFormat(state, new, (".safetensors", ".pth"), load, usage)


def _hf_folder(source: Pretrained) -> ExportFormat:
    made = _timm(source)

    def load(path: Path) -> StateDict:
        return timm.create_model(f"local-dir:{path}", pretrained=True).state_dict()

    usage = (
        'import timm\n\nnetwork = timm.create_model("local-dir:PATH", pretrained=True)  # num_classes=1000 adds a head'
    )
    return ExportFormat(made.state, made.new, (), load, usage)


def _torchvision(source: Pretrained) -> ExportFormat:
    name = _of_timm(source, "torchvision")
    torchvision_names(name, [])  # refused early where torchvision has none
    if source.spec.in_chans != 3:
        raise ValueError(
            f"torchvision's networks take images of 3 channels, these weights take {source.spec.in_chans}: "
            f"choose --to timm, safetensors or hf_folder"
        )
    network = torchvision.models.get_model(name, weights=None)
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    encoder = encoder_state_dict(source.model, name)
    names = torchvision_names(name, list(encoder))
    trained = {names[k]: v.reshape(shapes[names[k]]) for k, v in encoder.items()}
    state, new = _completed(trained, lambda: torchvision.models.get_model(name, weights=None))

    def load(path: Path) -> StateDict:
        load_strictly(network, read(path))
        return network.state_dict()

    usage = (
        f'import torch\nimport torchvision\n\nnetwork = torchvision.models.get_model("{name}")\n'
        'network.load_state_dict(torch.load("PATH", weights_only=True))'
    )
    return ExportFormat(state, new, (".pth",), load, usage)


def _safetensors(source: Pretrained) -> ExportFormat:
    name, stages = source.spec.network, source.spec.stages or None
    state = encoder_state_dict(source.model, name)

    def load(path: Path) -> StateDict:
        network = build_network(name, stages=stages, in_chans=source.spec.in_chans)
        keys = list(network.state_dict())
        names = dict(zip(keys, keys, strict=True)) if ":" in name else timm_names(keys, name)
        found = read(path)
        load_strictly(network, {k: found[names[k]] for k in keys if names[k] in found})
        return {names[k]: v for k, v in network.state_dict().items()}

    usage = (
        'from safetensors.torch import load_file\n\nstate = load_file("PATH")  # the encoder\'s tensors and no others'
    )
    return ExportFormat(state, [], (".safetensors",), load, usage)


def _spark(source: Pretrained) -> ExportFormat:
    """What the published pre-training saves, but for its optimiser: pretrain/spark.py (`state_dict`), utils/misc.py."""
    if not isinstance(source.model, SparK):
        raise ValueError(
            f"{source.path} was trained by the method {source.spec.method}, and the published format is SparK's: "
            f"choose --to timm, torchvision, safetensors, hf_folder or spark_encoder"
        )
    if not source.weights.state.has_decoder:
        raise ValueError(
            f"{source.path} holds only an encoder, and the published format needs a decoder: "
            f"choose --to timm, torchvision, safetensors, hf_folder or spark_encoder"
        )
    spec, model = source.spec, source.model
    height, width = spec.input_size
    size = height if height == width else [height, width]
    unused = {
        "imn_m": torch.zeros(1, spec.in_chans, 1, 1),
        "imn_s": torch.zeros(1, spec.in_chans, 1, 1),
        "norm_black": torch.zeros(1, spec.in_chans, height, width),
    }
    state = spark_state_dict(model) | unused
    config = {
        "mask_ratio": spec.mask_ratio,
        "densify_norm_str": "bn" if isinstance(model.densify_norms[0], nn.BatchNorm2d) else "ln",
        "sbn": False,  # not a matter of weights: so they load where there is one process, as in the notebook
        "hierarchy": len(model.mask_tokens),
        "sparse_encoder.input_size": size,
        "dense_decoder.width": spec.decoder_width,
    }
    whole: dict[str, object] = {"arch": spec.network, "input_size": size, "is_pretrain": True}
    whole["module"] = {**state, "config": config}

    def load(path: Path) -> StateDict:
        written = read(path)
        again = spec.build()
        load_spark_state_dict(again, written)
        return spark_state_dict(again) | {name: written["module"][name] for name in unused}

    usage = (
        'import torch\n\nstate = torch.load("PATH", weights_only=True)["module"]  # the published code: --init_weight\n'
        'config = state.pop("config")' + _beyond_published(spec, decoder=True)
    )
    return ExportFormat(state, [], (".pth",), load, usage, whole)


def _spark_encoder(source: Pretrained) -> ExportFormat:
    """What the published fine-tuning reads: timm's names for ResNets, the official ones for ConvNeXts."""

    def load(path: Path) -> StateDict:
        again = source.spec.build()
        load_into_spark(read_weights(path), again)
        return published_encoder(again)

    usage = (
        'import torch\n\nstate = torch.load("PATH", weights_only=True)  # the published fine-tuning: --resume_from'
        + _beyond_published(source.spec, decoder=False)
    )
    return ExportFormat(published_encoder(source.model), [], (".pth",), load, usage)


def _beyond_published(spec: ModelSpec, *, decoder: bool) -> str:
    """A comment for models that the published code does not have: it knows few networks and one decoder width."""
    lacks = [] if spec.network in PUBLISHED_MODELS.values() and not spec.stages else [f"no such {spec.network}"]
    if decoder and spec.decoder_width != ModelSpec.decoder_width:
        lacks.append(f"no decoder {spec.decoder_width} wide, only {ModelSpec.decoder_width}")
    if decoder and spec.input_size[0] != spec.input_size[1]:
        lacks.append("no input that is not square")
    if spec.in_chans != 3:
        lacks.append(f"no images of {spec.in_chans} channel{'s' * (spec.in_chans != 1)}")
    return (
        f"\n# the published code has {', '.join(lacks)}: this file is for other readers of its names" if lacks else ""
    )


EXPORT_FORMATS: dict[str, Callable[[Pretrained], ExportFormat]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "safetensors": _safetensors,
    "hf_folder": _hf_folder,
    "spark": _spark,
    "spark_encoder": _spark_encoder,
}


def _of_timm(source: Pretrained, to: str) -> str:
    name = source.spec.network
    if ":" in name:
        raise ValueError(f"{name} is your own network, which {to} does not have: choose --to safetensors or spark")
    return name


def _completed(trained: StateDict, build: Callable[[], nn.Module]) -> tuple[StateDict, list[str]]:
    """The whole state of a network: what is trained, and its own initial values (of seed 0) for the rest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = build().state_dict()
    new = [name for name in whole if name not in trained]
    return {name: trained.get(name, value).contiguous() for name, value in whole.items()}, new


def _timm_config(source: Pretrained) -> dict[str, object]:
    """What timm reads of a model folder: the network, and how its input was prepared.

    Of other than three channels `first_conv` is left out: timm before 1.0.31 would initialise that layer again.
    """
    spec, channels = source.spec, timm_channels(source.spec.in_chans)
    with torch.device("meta"):
        network: Any = timm.create_model(spec.network, num_classes=0, **channels)
    known = {k: network.pretrained_cfg.get(k) for k in ("classifier", *(() if channels else ("first_conv",)))}
    prepared = {"input_size": (spec.in_chans, *spec.input_size), "crop_pct": 1.0, "interpolation": "bicubic"}
    mean, std = spec.mean_and_std
    statistics = {"mean": mean, "std": std} if mean else {}
    return {
        "architecture": spec.network,
        "num_classes": 0,
        "num_features": network.num_features,
        "pretrained_cfg": {**known, **prepared, **statistics, "num_classes": 0},
        **({"model_args": channels} if channels else {}),
    }
