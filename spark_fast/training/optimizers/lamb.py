"""LAMB (You et al., ICLR 2020) without a loop over tensors, and with a device-side way to skip a step.

LAMB is Adam's direction with weight decay, u, scaled per tensor by |weights| / |u|. It comes from torch's fused AdamW
kernel, which is given -decay * weights and subtracts Adam's direction from it: what is left is -u. Two things come with
that kernel: it runs on CPU and CUDA over all tensors at once, and it obeys `found_inf`, the convention of torch's own
fused optimisers: where that device scalar is 1, nothing changes, without a host sync. Weight decay is applied
beforehand, and the learning rate goes into the last factors, so that both may be device scalars: a captured step
(`cuda_graph`) then follows the schedule.

What it costs is reading and writing memory: 14 passes over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from spark_fast.training.optimizers.device_rates import DeviceRates
from spark_fast.training.optimizers.layout import in_order, laid_out_as

LONG = 1e9  # a step count at which the bias correction is 1 in any precision


class Lamb(DeviceRates):
    """As timm.optim.Lamb without its clipping.

    Args:
        params: as for any optimiser; groups may have their own `lr` and `weight_decay`.
        betas: decay of the first and the second moment; `eps` is added to the root of the second.
        always_adapt: scale by the trust ratio also in groups without weight decay.
        bias_correction: apply Adam's bias correction, 1 / (1 - beta^t).
    """

    _step_supports_amp_scaling = True  # to torch.amp.GradScaler: hand over found_inf, do not look at it
    found_inf: Tensor | None = None  # a float scalar on the device; 1: leave weights and moments as they are
    grad_scale: Tensor | None = None  # the scale of the gradients, which is divided out

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        always_adapt: bool = False,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._always_adapt, self._bias_correction = always_adapt, bias_correction

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Advance all parameters that have a gradient."""
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p] or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = {name: laid_out_as(p, moment) for name, moment in state.items()}
            group["step"] = torch.as_tensor(group.get("step", 0.0), dtype=torch.float32, device=params[0].device)
            group["step"] += 1  # in place, as all that a captured step counts
            self._update(params, group, *(self.rates[number] if self.rates else (group["lr"], group["weight_decay"])))
            if self.found_inf is not None:
                group["step"] -= self.found_inf

    def _update(self, params: list[Tensor], group: dict, lr: float | Tensor, decay: float | Tensor) -> None:
        moved = torch._foreach_mul(params, -decay)
        step = group["step"] if self._bias_correction else torch.full_like(group["step"], LONG)
        torch._fused_adamw_(
            in_order(moved),
            in_order(laid_out_as(p, p.grad) for p in params),  # type: ignore[arg-type]
            in_order(self.state[p]["exp_avg"] for p in params),
            in_order(self.state[p]["exp_avg_sq"] for p in params),
            [],
            [step] * len(params),
            lr=1.0,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
        factor = lr if self.found_inf is None else lr * (1 - self.found_inf).to(params[0].dtype)
        if group["weight_decay"] or self._always_adapt:
            weights, directions = norms(params), norms(moved)
            trust = torch.where((weights > 0) & (directions > 0), weights / directions, 1.0)
            torch._foreach_addcmul_(params, moved, (trust * factor).unbind())
        else:
            torch._foreach_add_(params, torch._foreach_mul(moved, factor))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, (n,) for n of them, on their device.

    On a CPU torch takes the norm of a whole tensor in one thread, but norms of rows in all threads: so rows come first.
    """
    if not tensors[0].is_cuda:
        rows = [tuple(range(1, t.dim())) for t in tensors]
        tensors = [torch.linalg.vector_norm(t, dim=d) if d else t for t, d in zip(tensors, rows, strict=True)]
    return torch.stack(torch._foreach_norm(list(tensors)))
