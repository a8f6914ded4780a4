"""A full checkpoint of the published code, as a state that a run here resumes from (pretrain/utils/misc.py).

It holds the model, the optimiser, the last epoch, and the settings as text. torch numbers an optimiser's parameters
through its groups, in the order of `named_parameters`. A state dict has that order too, so the names in the file say
which moments are whose; the official ConvNeXts have another order than timm's.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spark_fast.checkpoint.file import Content, check_run, read
from spark_fast.errors import CheckpointError
from spark_fast.method import decays_by_default
from spark_fast.weights.named_tensors import State, matches, read_state
from spark_fast.weights.spark_keys import canonical_name

log = logging.getLogger("spark_fast")

MOMENTS = {  # what an optimiser keeps of a parameter
    frozenset({"exp_avg", "exp_avg_sq"}): "lamb",
    frozenset({"exp_avg", "exp_avg_sq", "step"}): "adamw",
    frozenset({"momentum_buffer"}): "sgd",
}


def read_resumable(path: Path) -> Content:
    """Read a checkpoint that a run can resume from: one of ours, or a full one of the published code.

    Raises:
        CheckpointError: it is neither.
    """
    content = read(path)
    return content if is_published(content) else dict(check_run(path, content))


def is_published(content: Content) -> bool:
    """Whether the published pre-training saved this, with all that it resumes from."""
    whole = all(isinstance(content.get(name), Mapping) for name in ("module", "optimizer"))
    epoch = content.get("epoch")
    return whole and isinstance(epoch, int) and epoch >= 0 and content.get("is_pretrain", True) is True


def published_run(
    path: Path, content: Content, model: nn.Module, optimizer: torch.optim.Optimizer, now: Mapping[str, object]
) -> Content:
    """Its "model" and "optimizer" as those of a run here, the epochs done, and the last loss.

    As there, the run goes on at the epoch after the last one with the settings of now; others are named.

    Args:
        now: published names of settings -> their values in this run.

    Raises:
        CheckpointError: it is of another model or optimiser, or not finite.
    """
    try:
        state = read_state(content)
        tensors = _model(state, model)
        moments = _moments(state, tensors, content["optimizer"], model, str(now["opt"]))
        groups = _groups(content["optimizer"], optimizer, counts=now["opt"] == "lamb")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if others := _others(content.get("args"), now):
        log.warning("%s: the run continues with settings that differ from its own: %s", path, "; ".join(others))
    log.info("%s was written by the published code: %d epochs are done", path, content["epoch"] + 1)
    numbered = dict(zip((i for group in groups for i in group["params"]), _names(optimizer, model), strict=True))
    return {
        "model": tensors,
        "optimizer": {"state": {i: moments[of] for i, of in numbered.items()}, "param_groups": groups},
        "epoch": content["epoch"] + 1,
        "loss": _last_loss(content.get("performance_desc")),
    }


def _others(args: object, now: Mapping[str, object]) -> list[str]:
    """What the file's settings, which are a printed dictionary, say otherwise; the published code compares nothing."""
    found = []
    for name, value in now.items():
        match = re.search(rf"'{name}': ('[^']{{,80}}'|[\d.eE-]{{1,20}})[,}}]", args) if isinstance(args, str) else None
        try:
            before = ast.literal_eval(match[1]) if match else value
        except (ValueError, SyntaxError):
            continue
        if before != value:
            found.append(f"{name} was {before!r}, is {value!r}")
    return found


def _model(state: State, model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the model's names; what the model lacks and the file has is refused, as what it misses is."""
    own = {name: canonical_name(name) for name in model.state_dict()}
    found = matches(own.values(), state.tensors)
    unknown = [name for key, name in state.names.items() if key not in found.values()] + state.others
    if unknown or len(found) < len(own):
        missing = [name for name, key in own.items() if key not in found]
        raise ValueError(
            f"it belongs to another model: it lacks {len(missing)} tensors of this one ({', '.join(missing[:3])}) and "
            f"has {len(unknown)} unknown ones ({', '.join(unknown[:3])})"
        )
    tensors = {name: state.tensors[found[key]] for name, key in own.items()}
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"it holds NaN or infinity, for example in {name} (a run that diverged?)")
    return tensors


def _moments(
    state: State, tensors: Mapping[str, Tensor], optimizer: Mapping, model: nn.Module, name: str
) -> dict[str, dict[str, Tensor]]:
    """The optimiser's tensors by the model's names of the parameters."""
    ours = {canonical_name(n): n for n, _ in model.named_parameters()}
    ordered = [(ours[key], listed) for key, listed in state.names.items() if key in ours]
    decays = [(n, decays_by_default(listed, tensors[n])) for n, listed in ordered]
    first = decays[0][1]
    names = [n for wanted in (first, not first) for n, decay in decays if decay == wanted]
    ids = [i for group in _list(optimizer, "param_groups") for i in _list(group, "params") if isinstance(i, int)]
    kept = optimizer.get("state")
    if len(ids) != len(names) or not isinstance(kept, Mapping):
        raise ValueError(f"its optimiser has {len(ids)} parameters, this model {len(names)}")
    found = {}
    for number, of in zip(ids, names, strict=True):
        moments = kept.get(number)
        moments = moments if isinstance(moments, Mapping) else {}
        kind = MOMENTS.get(frozenset(map(str, moments)))
        if kind != name:
            raise ValueError(f"its optimiser is {kind or 'another one'}, this run's {name}: use --opt {kind or 'lamb'}")
        shape = tensors[of].shape
        odd = [k for k, v in moments.items() if k != "step" and not (isinstance(v, Tensor) and v.shape == shape)]
        if odd:
            raise ValueError(f"its optimiser's {odd[0]} of {of} is not a tensor of shape {tuple(shape)}")
        found[of] = dict(moments)
    return found


def _groups(saved: Mapping, optimizer: torch.optim.Optimizer, counts: bool) -> list[dict]:
    """This optimiser's groups, with the steps that the saved one `counts` in its."""
    counted = [group.get("step") for group in _list(saved, "param_groups")] if counts else []
    if not all(isinstance(step, int) and 0 < step < 2**31 for step in counted):
        raise ValueError(f"its optimiser's groups have no step count: {counted}")
    groups, number = [], 0
    for group in optimizer.param_groups:
        params = list(range(number, number := number + len(group["params"])))
        steps = {"step": torch.tensor(float(max(counted)))} if counted else {}  # a tensor each, as each counts in place
        groups.append({**{k: v for k, v in group.items() if k != "params"}, **steps, "params": params})
    return groups


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[str]:
    """The model's names of the optimiser's parameters, in the order of their numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return (names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"])


def _list(content: object, name: str) -> list:
    found = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"its optimiser has no {name}")
    return list(found)


def _last_loss(text: object) -> float:
    """Of "smallest last", as the published code describes its performance."""
    numbers = re.findall(r"\d+\.\d+", text) if isinstance(text, str) else []
    return float(numbers[-1]) if numbers else float("nan")
