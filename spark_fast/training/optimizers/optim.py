"""Optimisers, their parameter groups and clipping, as published (pretrain/utils/lr_control.py, lamb.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from spark_fast.method import Method, Recipe
from spark_fast.training.optimizers.adamw import AdamW
from spark_fast.training.optimizers.lamb import Lamb, norms
from spark_fast.training.optimizers.sgd import SGD


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: with weight decay, and without. A method says which (`Recipe.decays`)."""
    decays = (model.recipe if isinstance(model, Method) else Recipe()).decays
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (decay if decays(name, parameter) else no_decay).append(parameter)
    return [{"params": decay, "decays": True}, {"params": no_decay, "decays": False}]


def build_optimizer(name: str, model: nn.Module, beta2: float, *, zero: bool = False) -> torch.optim.Optimizer:
    """LAMB, AdamW or SGD with Nesterov momentum; rates are set before every step by `set_rates`.

    Args:
        zero: ZeRO-1 (Rajbhandari et al., 2020): each rank keeps the moments of its share of the parameters and updates
            those. The state dict is the same as without, see `data_parallel.gather_state`; a resumed run may switch.

    Raises:
        ValueError: an unknown name.
    """
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        # the gradient is clipped by `clip_gradients`, which also reports its norm: one pass instead of two
        "lamb": (Lamb, {"betas": (0.9, beta2)}),
        "adamw": (AdamW, {"betas": (0.9, beta2), "fused": True}),
        "sgd": (SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    }
    if name not in kinds:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(kinds)}")
    kind, settings = kinds[name]
    settings = {"lr": 0.0, "weight_decay": 0.0, **settings}
    groups = parameter_groups(model)
    return ZeroRedundancyOptimizer(groups, kind, **settings) if zero else kind(groups, **settings)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients to a joint norm of at most `max_norm` (0: never); returns the norm before, a scalar."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(norms(grads))
    if max_norm > 0 and (norm.is_cuda or norm > max_norm):  # branching on a CUDA tensor would synchronise
        torch._foreach_mul_(grads, (max_norm / norm).clamp(max=1.0))
    return norm


def set_rates(optimizer: torch.optim.Optimizer, lr: float, decay: float) -> None:
    """Write this step's rates into the groups; `lr` is multiplied by a group's `lr_scale` (layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group.get("lr_scale", 1.0), decay if group["decays"] else 0.0
