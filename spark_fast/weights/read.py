"""The one reader of weights: a run folder, a checkpoint, a published file or an encoder becomes one `Weights`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from spark_fast.checkpoint.file import check_format, read
from spark_fast.checkpoint.manager import candidates, newest_readable
from spark_fast.checkpoint.state_dict import strip_prefixes, tensors_of
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.weights.identify import named_network, recognise
from spark_fast.weights.spark_keys import ENCODER, IGNORED, canonical_name, is_spark_name, network_name


@dataclass(frozen=True)
class State:
    """The tensors of a model, whoever wrote them.

    Attributes:
        tensors: under canonical names (see `spark_keys`).
        names: canonical name -> name in the file, for messages.
        others: what stands among the tensors and is none, by name.
        has_decoder: False for a plain network (the encoder alone, perhaps with a classifier).
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    others: list[str]
    has_decoder: bool


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
    """

    path: Path
    state: State
    named: str
    settings: Mapping[str, object]
    record: RunRecord | None
    input_size: tuple[int, int] | None

    @cached_property
    def network(self) -> str:
        """The network: as the file says, or by the shapes of its tensors; "" for one that is not known."""
        return self.named or recognise(self.state.tensors)

    @property
    def stages(self) -> int:
        """Levels that were pre-trained; 0: all, or the file does not say."""
        model = self.settings.get("model")
        stages = model.get("stages", 0) if isinstance(model, Mapping) else 0
        if not isinstance(stages, int):
            raise CheckpointError(f"{self.path} has settings that this version cannot read (stages is {stages!r})")
        return stages

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
            raise SettingsError(f"{self.path} is of your own network: say --model {self.network} to have it imported")
        return asked or self.network


def read_weights(source: Path) -> Weights:
    """Read weights, tensors on the host.

    Args:
        source: a run folder (its newest checkpoint that is whole), or a .pth or .safetensors file.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is refused.
    """
    path, content = _open(source)
    ours = isinstance(content.get("settings"), Mapping)
    if ours:
        check_format(path, content)
    settings: Mapping[str, object] = content["settings"] if ours else {}
    return Weights(
        path,
        read_state(content),
        named_network(path, content, settings),
        settings,
        _record(content) if ours else None,
        _input_size(content.get("input_size")),
    )


def read_state(content: Mapping) -> State:
    """The tensors in a checkpoint, or in a state dict, of SparK or of a plain network."""
    named = {str(name): value for name, value in tensors_of(content).items()}
    has_decoder = any(map(is_spark_name, named))
    tensors, names, others = {}, {}, []
    for name, value in named.items():
        if strip_prefixes(name) in IGNORED:
            continue
        if not isinstance(value, Tensor):
            others.append(f"{name} ({type(value).__name__})")
            continue
        key = canonical_name(name) if has_decoder else ENCODER + network_name(strip_prefixes(name))
        tensors[key], names[key] = value, name
    return State(tensors, names, others, has_decoder)


def _open(source: Path) -> tuple[Path, dict]:
    if not source.is_dir():
        return source, read(source)
    found = candidates(source)
    if not found:
        raise CheckpointError(
            f"there is no checkpoint in {source}: the folder holds no checkpoint of a run; "
            f"give a run folder, or a .pth or .safetensors file"
        )
    return newest_readable(found, read)


def _record(content: Mapping) -> RunRecord | None:
    step, epoch, loss, versions = (content.get(name) for name in ("step", "epoch", "loss", "versions"))
    if not (isinstance(step, int) and isinstance(epoch, int) and isinstance(loss, float)):
        return None
    return RunRecord(step, epoch, loss, versions if isinstance(versions, Mapping) else {})


def _input_size(value: object) -> tuple[int, int] | None:
    """(H, W) of a published file's "input_size": one number, or two."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return None
