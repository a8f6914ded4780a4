"""The one reader of weights: a run folder, a checkpoint, a published file or an encoder becomes one `Weights`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from spark_fast.checkpoint.file import check_format, read
from spark_fast.checkpoint.manager import candidates, newest_readable
from spark_fast.checkpoint.state_dict import tensors_of
from spark_fast.errors import CheckpointError, DataError, SettingsError
from spark_fast.networks import count_levels
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.weights.hub import HUB, read_from_hub
from spark_fast.weights.identify import (
    RECOGNISED,
    image_channels,
    lookalike,
    metadata_of,
    named_network,
    recognise,
    recognise_beneath,
)
from spark_fast.weights.named_tensors import (
    Shapes,
    State,
    beneath,
    decoder_levels,
    flatten,
    holds,
    places_of,
    read_state,
    which_of,
    wrapper_of,
)

log = logging.getLogger("spark_fast")


@dataclass(frozen=True)
class RunRecord:
    """Where a run stood when it wrote a checkpoint, and by which versions."""

    step: int
    epoch: int
    loss: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        path: the file that was read.
        state: its tensors.
        named: the network that the file names, "" where it names none.
        settings: of the run, as its checkpoint holds them; {} for a file that is not ours.
        record: of a checkpoint of ours.
        input_size: (H, W) that a published file names.
        mask_ratio: that a published file names.
        statistics: by which a run of ours normalised its images; None: ImageNet's, or not known.
        tensors: all in a file of a plain network, see `named_tensors.flatten`: a network may lie beneath a prefix.
        levels: that were pre-trained, as the metadata of a file or its decoder tell; 0: they do not.
    """

    path: Path
    state: State
    named: str
    settings: Mapping[str, object]
    record: RunRecord | None
    input_size: tuple[int, int] | None
    mask_ratio: float | None = None
    statistics: Statistics | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    levels: int = 0

    @cached_property
    def network(self) -> str:
        """The network: as the file says, or by the shapes of its tensors; "" for one that is not known.

        Raises:
            CheckpointError: it is in the file several times.
        """
        try:
            return self.named or recognise(self.state.tensors) or recognise_beneath(self.tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def holding(self, shapes: Shapes) -> State:
        """The tensors where a plain network of these shapes lies whole; where it does nowhere, the usual places.

        A place that is not the usual one is logged, and so are others that hold such a network as well.

        Raises:
            CheckpointError: several places hold one, and none of them is the usual one.
        """
        places = places_of(shapes, self.tensors)
        if holds(self.state.tensors, shapes):
            if wrapper := wrapper_of(shapes, self.state):
                log.info("%s: reading the network under %s", self.path, wrapper)
            usual = next(iter(self.state.tensors.values()), None)
            for place in places:
                if all(value is not usual for value in place.tensors.values()):
                    at = place.prefix.rstrip(".")
                    log.info("%s: %s fits as well; choose it by %s#%s", self.path, at, self.path, at)
            return self.state
        if len(places) > 1:
            raise CheckpointError(f"{self.path}: {which_of(place.prefix for place in places)}")
        if places:
            log.info("%s: reading the network under %s", self.path, places[0].prefix.rstrip("."))
        return places[0] if places else self.state

    def looks_like(self) -> str:
        """The network of timm that these weights are of, for a message that they do not fit; "" if nobody knows."""
        return lookalike(self.state, self.tensors, self.named)

    def unknown(self) -> str:
        """What is said where neither file nor user names the network."""
        hint = f" (it looks like {name})" if (name := self.looks_like()) else ""
        return f"{self.path}: only {', '.join(sorted(RECOGNISED))} are recognised: name the network with --model{hint}"

    def stages(self, network: str) -> int:
        """Levels of the network that were pre-trained; 0: all, or the file does not say."""
        model = self.settings.get("model")
        if not isinstance(model, Mapping):
            return 0 if self.levels and 0 < count_levels(network) <= self.levels else self.levels
        stages = model.get("stages", 0)
        if not isinstance(stages, int):
            raise CheckpointError(f"{self.path} has settings that this version cannot read (stages is {stages!r})")
        return stages

    def in_chans(self, network: str) -> int:
        """Channels of the images: as the run's settings say, or the first layer of the network."""
        data = self.settings.get("data")
        if not isinstance(data, Mapping):
            return image_channels(network, self.state, self.tensors)
        in_chans = data.get("in_chans", 3)
        if not isinstance(in_chans, int):
            raise CheckpointError(f"{self.path} has settings that this version cannot read (in_chans is {in_chans!r})")
        return in_chans

    @property
    def run_folder(self) -> Path | None:
        """The run folder that the file lies in, None where it was taken out of it."""
        return next((p for p in list(self.path.absolute().parents)[:2] if (p / "config.toml").is_file()), None)

    def choose_network(self, asked: str) -> str:
        """The network as asked, or as the file tells; "" where neither does.

        Raises:
            SettingsError: the file names code of yours. It is imported because you say so, never because a file does.
        """
        if not asked and ":" in self.network:
            raise SettingsError(
                f"{self.path} has the weights of your own network: pass --model {self.network} to import its code"
            )
        return asked or self.network


def read_weights(source: Path) -> Weights:
    """Read weights, tensors on the host.

    Args:
        source: a run folder (its newest checkpoint that is whole), a .pth or .safetensors file, or a name of the Hub
            (see `hub`). Of a file that holds several models, FILE#PREFIX is the one beneath this prefix.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is refused.
    """
    if str(source).startswith(HUB):
        network, found = read_from_hub(str(source))
        return Weights(source, read_state(found), network, {}, None, None)
    path, content = _open(source)
    ours = isinstance(content.get("settings"), Mapping)
    if ours:
        check_format(path, content)
    settings: Mapping[str, object] = content["settings"] if ours else {}
    told = metadata_of(path)
    if untrained := told.get("untrained", "").split():  # not weights that are to be used
        content = {name: value for name, value in content.items() if name not in untrained}
        shown = ", ".join(untrained[:5]) + (f" and {len(untrained) - 5} more" if untrained[5:] else "")
        log.info("%s: not read, because they were not pre-trained: %s", path, shown)
    try:
        state = read_state(content)
        tensors = {} if ours or state.has_decoder else flatten(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if state.prefix:
        log.info("%s: reading the model under %s", path, state.prefix.rstrip("."))
    return Weights(
        path,
        state,
        named_network(path, content, settings),
        settings,
        _record(content) if ours else None,
        _input_size(content.get("input_size")),
        _mask_ratio(tensors_of(content).get("config")),
        _statistics(path, content) if ours else None,
        tensors,
        int(told["stages"]) if re.fullmatch("[0-9]{1,3}", told.get("stages", "")) else decoder_levels(state.tensors),
    )


def _open(source: Path) -> tuple[Path, dict]:
    """What a source holds, and the file that was read."""
    if source.is_dir():
        if found := candidates(source):
            return newest_readable(found, read)
        raise CheckpointError(f"there is no checkpoint in {source}: pass a run folder, or a .pth or .safetensors file")
    file, _, prefix = str(source).rpartition("#")
    if source.exists() or not Path(file).is_file():
        return source, read(source)
    content = read(path := Path(file))
    try:
        part = beneath(tensors := flatten(content), f"{prefix}.")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not part:
        there = sorted({name.partition(".")[0] for name in tensors})
        raise CheckpointError(f"{path} has no tensor under {prefix}: its names begin with {', '.join(there[:8])}")
    return path, {"state_dict": part, "arch": content.get("arch"), "input_size": content.get("input_size")}


def _record(content: Mapping) -> RunRecord | None:
    step, epoch, loss, versions = (content.get(name) for name in ("step", "epoch", "loss", "versions"))
    if not (isinstance(step, int) and isinstance(epoch, int) and isinstance(loss, float)):
        return None
    return RunRecord(step, epoch, loss, versions if isinstance(versions, Mapping) else {})


def _statistics(path: Path, content: Mapping) -> Statistics | None:
    try:
        return Statistics.from_dict(content["statistics"]) if content.get("statistics") else None
    except DataError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _input_size(value: object) -> tuple[int, int] | None:
    """(H, W) of a published file's "input_size": one number, or two."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return None


def _mask_ratio(config: object) -> float | None:
    """The mask ratio in a published file's "config"."""
    found = config.get("mask_ratio") if isinstance(config, Mapping) else None
    return found if isinstance(found, float) and 0 < found < 1 else None
