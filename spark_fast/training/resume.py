"""Which checkpoint a run resumes from, and whether it is the same run."""

from __future__ import annotations

import logging
from pathlib import Path

from spark_fast.checkpoint.file import RunContent
from spark_fast.checkpoint.manager import candidates
from spark_fast.errors import CheckpointError, MisfitError, SettingsError
from spark_fast.pipelines.base import Pipeline
from spark_fast.run.config import nearest
from spark_fast.training.settings import Settings
from spark_fast.versions import versions

log = logging.getLogger("spark_fast")

# settings that change only rounding, or where results are stored and reported; and those of BATCH_STATISTICS
HARMLESS = {
    "data": {
        *("data_path", "val_path", "pipeline", "decode", "augment", "workers", "prefetch", "max_bad_fraction"),
        *("worker_processes", "cache_dir", "cache_size"),
        "max_pixels",  # what could not be read may be read now, as after a repair
    },
    "model": {"encoder", "sparse_conv", "init_weight", "verify"},
    "optim": {"accumulate", "allreduce", "zero", "max_bad_steps"},
    "run": {
        *("exp_name", "exp_dir", "resume", "device", "precision", "compile", "cuda_graph", "sync_batchnorm", "threads"),
        *("log_every", "save_every", "keep_last", "keep_every", "picture_every", "eval_every", "max_steps", "timeout"),
        *("picture_channels", "wandb", "dry_run", "profile"),
    },
}

# over which images a batch norm takes its statistics depends on these, as on the number of ranks
BATCH_STATISTICS = (("optim", "accumulate"), ("run", "sync_batchnorm"))


def checkpoints_to_resume(asked: str, folder: Path) -> list[Path]:
    """The checkpoints that `--resume asked` means for a run folder, the newest first; none for a fresh start.

    Raises:
        CheckpointError: a checkpoint was named and is not there, or the run folder's are gone.
    """
    if not asked:
        return []
    if asked != "auto":
        if Path(asked).is_dir() and (found := candidates(Path(asked))):
            raise CheckpointError(f"{asked} is a folder: name one of its checkpoints, as {found[0]}")
        if not Path(asked).is_file():
            raise CheckpointError(f"there is no checkpoint {asked} to resume from{nearest(asked, ['auto'])}")
        return [Path(asked)]
    found = candidates(folder)
    if not found:
        log.info("--resume auto: there is no checkpoint in %s yet, this run starts from the beginning", folder)
    return found


def check_same_run(path: Path, state: RunContent, settings: Settings, data: Pipeline) -> None:
    """Refuse to resume with other settings or data, which would silently be another run.

    What is compared is what the settings mean: `res50` is `resnet50`, a default is the value it stands for.

    Raises:
        MisfitError: with the list of differences.
        CheckpointError: its settings cannot be read.
    """
    try:
        before = Settings.from_dict(state["settings"]).meaning()
    except (TypeError, AttributeError, ValueError, SettingsError) as error:
        raise CheckpointError(f"{path} has settings that this version cannot read ({error})") from None
    now = settings.meaning()
    differences = differing(before, now, HARMLESS)
    refuse_differences(path, state, differences, data, "--init_weight to start a new run from its weights")
    for group, name in BATCH_STATISTICS:
        if before[group].get(name) != now[group][name]:
            log.warning("%s was %r, is %r: batch norms take their statistics over other images from here on",
                        name, before[group].get(name), now[group][name])  # fmt: skip


def in_published_names(settings: Settings) -> dict[str, object]:
    """The settings that the published code has too, by its names for them, with its spelling of values."""
    optim = settings.optim
    return {
        **{"model": settings.network, "input_size": settings.size[0], "mask": settings.model.mask_ratio},
        **{"bs": settings.data.batch_size, "ep": optim.epochs, "wp_ep": settings.warmup_epochs, "clip": optim.clip},
        **{"base_lr": optim.base_lr, "wd": optim.weight_decay, "wde": optim.weight_decay_end or optim.weight_decay},
        **{"opt": optim.optimizer, "ada": settings.beta2},
    }


def differing(before: dict, now: dict, harmless: dict[str, set[str]]) -> list[str]:
    """The settings that differ now, without the harmless ones, in words."""
    return [
        f"{name} was {before[group].get(name)!r}, is {value!r}"
        for group, values in now.items()
        for name, value in values.items()
        if name not in harmless[group] and before[group].get(name) != value
    ]


def refuse_differences(path: Path, state: RunContent, differences: list[str], data: Pipeline, else_: str) -> None:
    """Raise MisfitError if there are differences between the run of a checkpoint and this one, or in the data.

    `else_`: what to give where another run is meant. Other versions are only warned of.
    """
    if state["num_samples"] != data.num_samples:
        differences.append(f"the data had {state['num_samples']} images, now {data.num_samples}")
    elif (before := state.get("listing")) and data.listing and before != data.listing:
        differences.append(f"the data are {data.num_samples} different images: names or labels differ")
    if differences:
        raise MisfitError(
            f"{path} belongs to another run: {'; '.join(differences)}. Use the same settings to resume it, or {else_}"
        )
    now = versions()
    changed = [f"{k} {v} (now {now.get(k)})" for k, v in state.get("versions", {}).items() if now.get(k) != v]
    if changed:
        log.warning("%s was written by %s: the run continues, but rounding may differ", path, ", ".join(changed))
