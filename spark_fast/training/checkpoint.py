"""Checkpoints: written whole or not at all, read without running anything that they contain."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from spark_fast.published import load_spark_state_dict, load_strictly, strip_prefixes

FORMAT = 1
RUN_STATE = {"model", "optimizer", "step", "epoch", "loss", "settings", "num_samples", "random_state", "scaler"}


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or used; the message names the file."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` holds the old content or the new, whatever happens, power failure included.

    Raises:
        CheckpointError: the file system refuses (full, read-only); what was there before stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, (OSError, RuntimeError)):  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(f"cannot write {path}: {error}; the file before it is kept") from error
        raise


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **state: Any) -> None:
    """Write model, optimiser and `state` (step, epoch, loss, settings, ...; plain types and tensors)."""
    content = {"format": FORMAT, "model": model.state_dict(), "optimizer": optimizer.state_dict(), **state}
    write_atomically(path, lambda file: torch.save(content, file))


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint file, tensors on the host.

    Raises:
        CheckpointError: missing, damaged, or one that would run code (it is refused, nothing is run).
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None  # torch.load checks no CRC
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged, or contains pickled code beyond tensors ({_first_line(error)})"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read, it is damaged ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def read_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a run can go on from.

    Raises:
        CheckpointError: it is none.
    """
    content = read(path)
    if content.get("format") != FORMAT or not set(content) >= RUN_STATE:
        raise CheckpointError(
            f"{path} is no checkpoint that a run can go on from; --init_weight starts from its weights"
        )
    return content


def restore(path: Path, content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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


def load_weights(path: Path, model: nn.Module) -> None:
    """Start from the weights of a checkpoint: ours, or a published one (`load_spark_state_dict`).

    Raises:
        CheckpointError: it does not fit, by name.
    """
    content = read(path)
    try:
        if isinstance(content.get("model"), dict):
            load_strictly(model, {strip_prefixes(str(k)): v for k, v in content["model"].items()})
        else:
            load_spark_state_dict(model, content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
