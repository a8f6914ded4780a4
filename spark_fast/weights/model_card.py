"""The model card beside exported weights: what they are of, how they load and were made, and how the loss fell."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import tomli_w

from spark_fast.pipelines.transforms.resize import MEAN, STD
from spark_fast.versions import versions
from spark_fast.weights.load_pretrained import Pretrained

CURVE_ROWS = 12  # epochs in the table of losses
FRONT = "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n- timm\n- spark\n---\n\n"  # the Hub's


def model_card(source: Pretrained, to: str, new: list[str], usage: str) -> str:
    """Markdown.

    Args:
        new: tensors that were not pre-trained.
        usage: Python that loads the weights.
    """
    parts = [
        f"# {source.spec.network}, pre-trained by SparK",
        "Masked image modelling with a ConvNet ([SparK](https://arxiv.org/abs/2301.03580)): "
        f"{_task(source)} The features are meant for fine-tuning, not for linear probing.",
        f"## Use\n\n```python\n{usage}\n```",
        _new_tensors(new),
        _made(source, to),
        _curve(source),
        _settings(source),
    ]
    front = FRONT if to == "hf_folder" else ""
    return front + "\n\n".join(part for part in parts if part) + "\n"


def _task(source: Pretrained) -> str:
    """What was learned, where it is known."""
    if source.weights.record is None:
        return f"patches of {source.model.patch} px."
    (height, width), channels = source.spec.input_size, source.spec.in_chans
    return (
        f"patches of {source.model.patch} px, {source.spec.mask_ratio:.0%} of them hidden, input "
        f"{height}x{width} px{f' of {channels} channel' + 's' * (channels != 1) if channels != 3 else ''}, "
        f"normalised by {_statistics(source)}."
    )


def _statistics(source: Pretrained) -> str:
    """The mean and the deviation of the images, in words."""
    mean, std = source.spec.mean_and_std
    if (mean, std) == (MEAN, STD):
        return "ImageNet's mean and standard deviation"
    listed = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    return f"mean {listed[0]} and standard deviation {listed[1]}" if mean else "an unknown mean and standard deviation"


def _new_tensors(new: list[str]) -> str:
    if not new:
        return ""
    shown = ", ".join(f"`{name}`" for name in new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
    return f"Not pre-trained, still at their initial values: {shown}. Train them yourself."


def _made(source: Pretrained, to: str) -> str:
    """Where the weights come from."""
    record, started = source.weights.record, _last_start(source.weights.run_folder)
    rows = {
        "file": f"`{source.path.resolve().name}`, exported `--to {to}`",
        "step, epoch": f"{record.step}, {record.epoch} of {_epochs(source)}" if record else "",
        "loss": f"{record.loss:.4f}" if record else "",
        "commit": started.get("git_commit_id", ""),
        "command": f"`{started['cmd']}`" if "cmd" in started else "",
        "trained with": _listed(record.versions) if record else "",
        "exported with": _listed(versions()),
    }
    lines = [f"| {name} | {value or 'not known'} |" for name, value in rows.items()]
    return "\n".join(["## Origin", "", "| | |", "| --- | --- |", *lines])


def _epochs(source: Pretrained) -> object:
    """Of the whole run."""
    optim = source.weights.settings.get("optim")
    return optim.get("epochs", "?") if isinstance(optim, Mapping) else "?"


def _curve(source: Pretrained) -> str:
    """Mean loss of up to CURVE_ROWS epochs, evenly spread, the first and the last among them."""
    record, by_epoch = source.weights.record, defaultdict[int, list[float]](list)
    for row in _rows(source.weights.run_folder, "metrics.jsonl"):
        step, epoch, loss = row.get("step"), row.get("epoch"), row.get("loss")  # a loss that is not finite is null
        if not (isinstance(step, int) and isinstance(epoch, int) and isinstance(loss, float)):
            continue
        if math.isfinite(loss) and (record is None or step <= record.step):
            by_epoch[epoch].append(loss)
    epochs = sorted(by_epoch)
    if not epochs:
        return ""
    count = min(CURVE_ROWS, len(epochs))
    picked = sorted({epochs[round(i * (len(epochs) - 1) / max(1, count - 1))] for i in range(count)})
    lines = [f"| {e} | {sum(by_epoch[e]) / len(by_epoch[e]):.4f} |" for e in picked]
    return "\n".join(["## Loss", "", "| epoch | loss |", "| --- | --- |", *lines])


def _settings(source: Pretrained) -> str:
    """The run's settings as TOML; only ours are known."""
    if source.weights.record is None:
        return ""
    groups = {name: group for name, group in source.weights.settings.items() if isinstance(group, Mapping)}
    given = {
        name: {k: v for k, v in group.items() if isinstance(v, (str, int, float))} for name, group in groups.items()
    }
    return f"## Settings\n\n```toml\n{tomli_w.dumps(given)}```"


def _last_start(folder: Path | None) -> dict[str, object]:
    """The last start that log.txt describes; {} without a log."""
    return next((row for row in reversed(list(_rows(folder, "log.txt"))) if "git_commit_id" in row), {})


def _rows(folder: Path | None, name: str) -> Iterator[dict[str, object]]:
    """The lines of JSON in a file of the run folder, where it is there; one cut off by a kill is left out."""
    if folder is None or not (folder / name).is_file():
        return
    for line in (folder / name).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in names.items())
