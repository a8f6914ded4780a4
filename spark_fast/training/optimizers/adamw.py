"""torch's AdamW, which can also be captured with rates that change (Loshchilov and Hutter, ICLR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from spark_fast.training.optimizers.device_rates import DeviceRates
from spark_fast.training.optimizers.layout import in_order, laid_out_as


class AdamW(DeviceRates, torch.optim.AdamW):
    """torch.optim.AdamW; with rates on the device, its fused kernel reads the learning rate there.

    That kernel takes weight decay from the host alone: so the weights are multiplied by 1 - lr * decay before it.
    """

    found_inf: Tensor | None = None  # a float scalar on the device; 1: leave weights and moments as they are

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Advance all parameters that have a gradient."""
        if not self.rates:
            super().step()
            return
        written = [(group["lr"], group["weight_decay"], group["capturable"]) for group in self.param_groups]
        for group, (lr, decay) in zip(self.param_groups, self.rates, strict=True):
            moved = lr * decay if self.found_inf is None else lr * decay * (1 - self.found_inf)
            if params := [p for p in group["params"] if p.grad is not None]:
                torch._foreach_mul_(params, 1 - moved)
            group.update(lr=lr, weight_decay=0.0, capturable=True)
        super().step()
        for group, (lr, decay, capturable) in zip(self.param_groups, written, strict=True):
            group.update(lr=lr, weight_decay=decay, capturable=capturable)

    def _init_group(self, group: dict, params: list[Tensor], grads: list[Tensor], *moments: list[Tensor]) -> bool:
        """torch's own, which collects what the kernel gets; then all of it is laid out alike (`layout`)."""
        has_complex = super()._init_group(group, params, grads, *moments)
        for i, p in enumerate(params):
            grads[i] = laid_out_as(p, grads[i])
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=False):
                moment[i] = self.state[p][name] = laid_out_as(p, moment[i])
        for tensors in (params, grads, *moments[:2]):
            tensors[:] = in_order(tensors)
        return has_complex
