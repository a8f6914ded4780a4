"""A linear layer on frozen features, with MAE's choices (He et al., CVPR 2022; main_linprobe.py of its code).

The optimiser is LARS, without weight decay. BatchNorm without scale and shift comes before the layer, so that one
learning rate suits features of any magnitude. Features are computed once, of central crops; or, as MAE does, of new
random crops every epoch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spark_fast.errors import NotFiniteError
from spark_fast.evaluation.eval_settings import Probe
from spark_fast.pipelines.sampler import order
from spark_fast.reporting.run_summary import long_warmup
from spark_fast.run.data_parallel import data_parallel, share_statistics
from spark_fast.run.distributed import Ranks
from spark_fast.training.optimizers.optim import set_rates
from spark_fast.training.schedule import learning_rate

log = logging.getLogger("spark_fast")

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # epoch -> (B, C) and (B,) of this rank


class LinearProbe(nn.Module):
    """(B, C) -> (B, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
        self.head = nn.Linear(channels, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """The logits, (B, classes)."""
        return self.head(self.norm(features))


def shuffled(features: Tensor, labels: Tensor, share: int, steps: int, seed: int) -> Batches:
    """Batches of `share` rows of `features`, (N, C), and `labels`, (N,), in another order every epoch.

    An epoch has `steps` batches; the rows left over wait for another epoch.
    """

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.from_numpy(order(len(features), seed, number)).to(features.device)
        for ids in rows[: steps * share].split(share):
            yield features[ids], labels[ids]

    return epoch


def train_probe(
    probe: LinearProbe,
    batches: Batches,
    steps: int,
    settings: Probe,
    batch_size: int,
    ranks: Ranks,
    tell: Callable[[int, float, float], None],
) -> None:
    """Train the probe; `tell(epochs done, mean loss, learning rate)` is called after every epoch.

    Args:
        steps: per epoch.
        batch_size: over all ranks.

    Raises:
        NotFiniteError: the loss is not finite.
    """
    model = data_parallel(probe.train(), ranks, static=True, gradients_in_bf16=False)
    optimizer = _optimizer(probe, settings.optimizer)
    peak, total = settings.base_lr * batch_size / 256, settings.epochs * steps
    if doubt := long_warmup(settings.warmup_epochs * steps, total):
        log.warning(doubt)
    step = 0
    for epoch in range(settings.epochs):
        losses = []
        probe.train()
        for features, labels in batches(epoch):
            rate = learning_rate(step, peak, settings.warmup_epochs * steps, total)
            set_rates(optimizer, rate, settings.weight_decay)
            optimizer.zero_grad(set_to_none=True)
            loss = cross_entropy(model(features), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        mean = ranks.mean(torch.stack(losses).mean()).item()
        if not math.isfinite(mean):
            raise NotFiniteError(
                f"the probe's loss is not finite after epoch {epoch + 1}: lower --base_lr ({rate:g} now)"
            )
        share_statistics(probe, ranks)
        tell(epoch + 1, mean, rate)


def _optimizer(probe: LinearProbe, name: str) -> torch.optim.Optimizer:
    """LARS adapts the rate of the layer's weight, not of its bias; weight decay acts on the weight alone, too."""
    groups = [
        {"params": [probe.head.weight], "decays": True, "always_adapt": True},
        {"params": [probe.head.bias], "decays": False, "always_adapt": False},
    ]
    if name != "lars":
        groups = [{k: v for k, v in group.items() if k != "always_adapt"} for group in groups]
    momentum = {} if name == "adamw" else {"momentum": 0.9}
    return create_optimizer_v2(groups, opt=name, lr=0.0, weight_decay=0.0, **momentum)  # type: ignore[arg-type]
