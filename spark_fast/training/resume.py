"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from spark_fast.training.checkpoint import CheckpointError
from spark_fast.training.run_folder import CHECKPOINT
from spark_fast.training.settings import Settings

log = logging.getLogger("spark_fast")

# settings that change nothing of what is computed but rounding, or only where it is stored and told
HARMLESS = {
    "data": {"data_path", "pipeline", "decode", "augment", "workers", "prefetch", "max_bad_fraction"},
    "model": {"encoder", "sparse_conv", "init_weight", "verify"},
    "optim": {"accumulate"},
    "run": {
        *("exp_name", "exp_dir", "resume", "device", "precision", "compile", "sync_batchnorm", "threads"),
        *("log_every", "save_every", "picture_every", "max_steps"),
        *("wandb", "dry_run", "profile"),
    },
}


def checkpoint_to_resume(settings: Settings) -> Path | None:
    """The checkpoint that --resume means, None for a fresh start.

    Raises:
        CheckpointError: a checkpoint was named and is not there.
    """
    asked = settings.run.resume
    if not asked:
        return None
    path = settings.folder / CHECKPOINT if asked == "auto" else Path(asked)
    if path.is_file():
        return path
    if asked == "auto":
        log.info("--resume auto: there is no %s yet, this run starts from the beginning", path)
        return None
    raise CheckpointError(f"there is no checkpoint {path} to resume from")


def check_same_run(path: Path, state: dict[str, Any], settings: Settings, num_samples: int) -> None:
    """Refuse to go on with other settings or data, which would silently be another run.

    Raises:
        CheckpointError: with the list of differences.
    """
    now, then, default = settings.to_dict(), state["settings"], Settings().to_dict()
    before = {group: {**default[group], **then[group]} for group in now}  # older checkpoints know fewer settings
    differences = [
        f"{name} was {before[group][name]!r}, is {value!r}"
        for group, values in now.items()
        for name, value in values.items()
        if name not in HARMLESS[group] and before[group][name] != value
    ]
    if state["num_samples"] != num_samples:
        differences.append(f"the data had {state['num_samples']} images, now {num_samples}")
    if differences:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(differences)}. Give the same settings to go on with it, "
            f"or --init_weight to begin a new run from its weights"
        )
