"""Learning rate and weight decay on the device, where every replay of a captured step (`cuda_graph`) reads them."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceRates(torch.optim.Optimizer):
    """An optimiser that takes its rates from the device after the first `put_rates`, before it from its groups.

    Attributes:
        rates: learning rate and weight decay of each group, two scalars; none before `put_rates`.
    """

    rates: tuple[tuple[Tensor, Tensor], ...] = ()

    def put_rates(self) -> None:
        """Write the groups' rates to the device, always to the same place; without a host sync."""
        if not self.rates:
            any_ = next(p for group in self.param_groups for p in group["params"])
            places = any_.new_empty(len(self.param_groups), 2)
            self.rates = tuple((place[0], place[1]) for place in places)
        for group, (lr, decay) in zip(self.param_groups, self.rates, strict=True):
            lr.fill_(group["lr"])
            decay.fill_(group["weight_decay"])
