"""Checkpoints: written whole or not at all, with a SHA-256 beside; read without running anything that they contain."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import NotRequired

from spark_fast.checkpoint.state_dict import load_strictly
from spark_fast.checkpoint.validate_file import RefusedError, check_safetensors, check_sha256, check_zip, sidecar
from spark_fast.errors import CheckpointError
from spark_fast.files import atomic_write

log = logging.getLogger("spark_fast")

T = TypeVar("T")

FORMAT = 1
RUN_STATE = {"model", "optimizer", "step", "epoch", "loss", "settings", "num_samples", "random_state", "scaler"}

Content = dict[str, Any]  # of a file from anywhere: every entry must be checked


class RunContent(TypedDict):
    """The content of a checkpoint that a run can resume from; fine-tuning adds more."""

    format: int
    model: dict[str, Tensor]
    optimizer: Content
    step: int
    epoch: int
    loss: float
    settings: dict[str, Content]
    num_samples: int
    random_state: dict[str, Tensor]
    scaler: Content
    listing: NotRequired[str]  # of the data; older versions did not keep it
    versions: NotRequired[dict[str, str]]
    statistics: NotRequired[Content]  # by which the images are normalised, if not by ImageNet's
    ema: NotRequired[dict[str, Tensor]]
    best: NotRequired[Content]


def snapshot(state: T) -> T:
    """A copy of nested dictionaries, lists and tensors on the host, which the next step does not change."""
    if isinstance(state, Tensor):
        return cast(T, state.detach().to("cpu", copy=True))
    if isinstance(state, dict):
        return cast(T, {key: snapshot(value) for key, value in state.items()})
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    return state


def run_state(model: nn.Module, optimizer: torch.optim.Optimizer, **state: object) -> Content:
    """A snapshot of model, optimiser and `state` (step, epoch, loss, settings, ...; plain types and tensors)."""
    content = {"format": FORMAT, "model": model.state_dict(), "optimizer": optimizer.state_dict(), **state}
    return snapshot(content)


def tensor_bytes(state: object) -> int:
    """Bytes of all tensors in nested dictionaries and lists: a checkpoint's size but for some kilobytes."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(tensor_bytes(part) for part in parts)


def write(path: Path, content: Content) -> str:
    """Write a checkpoint and its checksum, the file itself last; returns the SHA-256.

    A kill leaves the old file, or the new one, or the old one with the new checksum, which is then refused as
    damaged: never a file that looks whole and is not.

    Raises:
        CheckpointError: the file system refuses; it says how much space is needed.
    """
    hashed = _Hashed()
    try:
        with atomic_write(path) as file:
            try:
                # written front to back, so it can be hashed on the way
                torch.save(content, cast(BinaryIO, hashed.into(file)))
            except RuntimeError as error:
                raise hashed.error or OSError(str(error)) from None
            file.flush()
            os.fsync(file.fileno())
            with atomic_write(sidecar(path)) as beside:
                beside.write(f"{hashed.sha256.hexdigest()}  {path.name}\n".encode())  # what `sha256sum --check` reads
    except OSError as error:
        room = ""
        with suppress(OSError):
            room = f", and {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free there"
        text = f"{error.strerror or error}. It needs {tensor_bytes(content) / 1e6:.1f} MB{room}"
        raise CheckpointError(text) from error
    return hashed.sha256.hexdigest()


class _Hashed:
    """Passes on to a file what is written, and hashes it on the way."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self._file: BinaryIO
        self.error: OSError | None = None  # torch raises a puzzle of its own instead

    def into(self, file: BinaryIO) -> _Hashed:
        self._file = file
        return self

    def write(self, part: bytes) -> int:
        self.sha256.update(part)
        try:
            return self._file.write(part)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def read(path: Path) -> Content:
    """Read a checkpoint file, tensors on the host: torch's zip format, or safetensors.

    The checksum beside it is checked, or where there is none the zip format's own.

    Raises:
        CheckpointError: missing, damaged, or one that would run code (it is refused, nothing is run).
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        proven = check_sha256(path)
        if path.suffix == ".safetensors":
            check_safetensors(path)
            return dict(load_file(path))
        check_zip(path, crc=not proven)
        if not proven:
            log.info("%s has no checksum file (%s): loaded without verifying it", path, sidecar(path).name)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RefusedError as error:
        raise CheckpointError(f"{path} {error}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was not loaded: it is damaged, or holds pickled code besides tensors ({_first_line(error)})"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: it is damaged ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def read_run(path: Path) -> RunContent:
    """Read a checkpoint that a run can resume from.

    Raises:
        CheckpointError: it is none.
    """
    return check_run(path, read(path))


def check_run(path: Path, content: Content) -> RunContent:
    """Raise CheckpointError for content that no run can resume from."""
    check_format(path, content)
    if content.get("format") != FORMAT or not set(content) >= RUN_STATE:
        raise CheckpointError(
            f"{path} is not a checkpoint that a run can resume from: it lacks "
            f"{', '.join(sorted(RUN_STATE - set(content))) or 'its format'}. To start a new run from its weights use "
            f"--init_weight (--weights for an evaluation)"
        )
    return cast(RunContent, content)


def check_format(path: Path, content: Content) -> None:
    """Raise CheckpointError for a format of another version that this one does not know."""
    if isinstance(content.get("format"), int) and content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads {FORMAT}")


def restore(path: Path, content: RunContent, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `read_run` returned into model and optimiser, and restore the random state.

    Raises:
        CheckpointError: it is of another model.
    """
    try:
        load_strictly(model, content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    torch.set_rng_state(content["random_state"]["cpu"])
    if "cuda" in content["random_state"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["random_state"]["cuda"])


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators on this rank, by device type: (bytes,) uint8 each, on the host."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
