"""State dicts in files: where they lie, which prefixes wrappers add to names, and loading whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
MISFIT = "the checkpoint does not fit this model. "


def tensors_of(content: Mapping) -> Mapping:
    """The state dict in a checkpoint: under "model", "module" or "state_dict", or the whole of it."""
    return next((content[k] for k in ("model", "module", "state_dict") if isinstance(content.get(k), Mapping)), content)


def strip_prefixes(name: str) -> str:
    """Without the prefixes that wrappers add, in any order."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], unknown: list[str] | None = None) -> None:
    """Load a state dict, tensors of any shape by name, whole or not at all.

    Args:
        unknown: more names that are not in this model, for the message.

    Raises:
        ValueError: tensors are missing, unknown or of another shape than the model's; the message names them.
    """
    own = model.state_dict()
    unknown = (unknown or []) + [name for name in state if name not in own]
    missing = [name for name in own if name not in state]
    odd = [n for n in own if n in state and not isinstance(state[n], Tensor)]
    shapes = [
        f"{n} is {tuple(state[n].shape)}, the model's {tuple(v.shape)}"
        for n, v in own.items()
        if n in state and n not in odd and state[n].shape != v.shape
    ]
    problems = []
    for what, names in (
        ("wrong shape", shapes),
        ("not a tensor", odd),
        ("missing", missing),
        ("not in this model", unknown),
    ):
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{what}: {'; '.join(names[:3])}{more}")
    if problems:
        raise ValueError(MISFIT + ". ".join(problems))
    model.load_state_dict(state)
