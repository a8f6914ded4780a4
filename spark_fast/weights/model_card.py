"""The model card beside exported weights: what they are of, how they load and were made, and how the loss fell."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from spark_fast.reporting.metrics_file import read_metrics
from spark_fast.versions import versions
from spark_fast.weights.pretrained import Pretrained

CURVE_ROWS = 12  # epochs in the table of losses
FRONT = "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n- timm\n- spark\n---\n\n"  # the Hub's


def model_card(source: Pretrained, form: str, new: list[str], usage: str) -> str:
    """Markdown.

    Args:
        new: tensors that were not pre-trained.
        usage: Python that loads the weights.
    """
    settings = source.settings
    parts = [
        f"# {settings.network}, pre-trained by SparK",
        "Masked image modelling with a ConvNet ([SparK](https://arxiv.org/abs/2301.03580)): "
        f"{_task(source)} The features are meant for fine-tuning, not for linear probing.",
        f"## Use\n\n```python\n{usage}\n```",
        _new_tensors(new),
        _made(source, form),
        _curve(source),
        _settings(source),
    ]
    front = FRONT if form == "hf_folder" else ""
    return front + "\n\n".join(part for part in parts if part) + "\n"


def _task(source: Pretrained) -> str:
    """What was learned, where it is known."""
    if not source.record:
        return f"patches of {source.model.patch} px."
    height, width = source.settings.size
    return (
        f"patches of {source.model.patch} px, {source.settings.model.mask_ratio:.0%} of them hidden, input "
        f"{height}x{width} px, normalised by ImageNet's mean and deviation."
    )


def _new_tensors(new: list[str]) -> str:
    if not new:
        return ""
    shown = ", ".join(f"`{name}`" for name in new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
    return f"Not pre-trained, at their initial values, to be trained by you: {shown}."


def _made(source: Pretrained, form: str) -> str:
    """Where the weights come from."""
    record = source.record
    started = _head_of_log(source.folder)
    rows = {
        "file": f"`{source.path.resolve().name}`, exported `--to {form}`",
        "step, epoch": f"{record['step']}, {record['epoch']} of {source.settings.optim.epochs}" if record else "",
        "loss": f"{record['loss']:.4f}" if record else "",
        "commit": started.get("git_commit_id", ""),
        "command": f"`{started['cmd']}`" if "cmd" in started else "",
        "trained with": _listed(record.get("versions", {})),
        "exported with": _listed(versions()),
    }
    lines = [f"| {name} | {value or 'not known'} |" for name, value in rows.items()]
    return "\n".join(["## Origin", "", "| | |", "| --- | --- |", *lines])


def _curve(source: Pretrained) -> str:
    """Mean loss of up to CURVE_ROWS epochs, evenly spread, the first and the last among them."""
    if source.folder is None or not (source.folder / "metrics.jsonl").is_file():
        return ""
    by_epoch: dict[int, list[float]] = defaultdict(list)
    for row in read_metrics(source.folder / "metrics.jsonl"):
        if row["step"] <= source.record.get("step", math.inf) and math.isfinite(row["loss"]):
            by_epoch[row["epoch"]].append(row["loss"])
    epochs = sorted(by_epoch)
    if not epochs:
        return ""
    count = min(CURVE_ROWS, len(epochs))
    picked = sorted({epochs[round(i * (len(epochs) - 1) / max(1, count - 1))] for i in range(count)})
    lines = [f"| {e} | {sum(by_epoch[e]) / len(by_epoch[e]):.4f} |" for e in picked]
    return "\n".join(["## Loss", "", "| epoch | loss |", "| --- | --- |", *lines])


def _settings(source: Pretrained) -> str:
    """The run's settings as TOML; only ours are known."""
    return f"## Settings\n\n```toml\n{source.settings.to_toml()}```" if source.record else ""


def _head_of_log(folder: Path | None) -> dict[str, Any]:
    """The last start that log.txt describes; {} without a log."""
    if folder is None or not (folder / "log.txt").is_file():
        return {}
    found: dict[str, Any] = {}
    for line in (folder / "log.txt").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(row, dict) and "git_commit_id" in row:
            found = row
    return found


def _listed(names: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in names.items())
