"""One training step: forward, backward, clip, update. Nothing in it waits for the device.

Precision: the model computes under autocast, parameters and optimiser stay in fp32, the loss is taken in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spark_fast.reporting.mfu import is_emulated, matmul_rate
from spark_fast.reporting.step_timer import StepClock
from spark_fast.training.cuda_graph import StepGraph
from spark_fast.training.nonfinite import NonfiniteGuard
from spark_fast.training.optimizers.device_rates import DeviceRates
from spark_fast.training.optimizers.optim import clip_gradients, set_rates
from spark_fast.training.schedule import Schedule

log = logging.getLogger("spark_fast")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TrainStep:
    """A model with its optimiser, advanced one batch at a time.

    Args:
        model: called as model(images, visible) -> loss; may be compiled or wrapped for data parallelism. `visible` is
            passed on unread: the visible patches in pre-training, the targets in fine-tuning.
        precision: bf16, fp16 or fp32.
        clip: largest norm of all gradients together, 0 for no clipping.
        accumulate: the batch is cut into so many parts, whose gradients are averaged.
        agree: the maximum of a tensor of any shape over all ranks.
        cuda_graph: replay the whole step as one CUDA graph, after a few ordinary steps; see `StepGraph`.

    Raises:
        ValueError: a graph was asked for where there can be none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        precision: str,
        device: torch.device,
        clip: float,
        accumulate: int = 1,
        agree: Callable[[Tensor], Tensor] = torch.clone,
        cuda_graph: bool = False,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.clip, self.accumulate, self.device = clip, accumulate, device
        self.dtype = DTYPES[precision]
        self.clock = StepClock(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.guard = NonfiniteGuard(model, agree, overflow_is_normal=self.scaler.is_enabled())
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.graph: StepGraph | None = None
        if cuda_graph:
            self._check_graph()
            self.graph = StepGraph(self._advance, device, self.clock)

    def __call__(self, step: int, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one batch.

        Args:
            step: of the run, from 0; decides the rates.
            images: (B, C, H, W) channels_last.
            visible: (B*K, L) int64 for K masks per image, see `masking.sample_visible`; the targets in fine-tuning.

        Returns:
            the loss and the norm of the gradient before clipping, scalars on the device. Where one of them is not
            finite nothing was changed, see `NonfiniteGuard`.
        """
        set_rates(self.optimizer, *self.schedule.at(step))
        if self.graph is None:
            loss, norm, bad = self._advance(images, visible)
        else:
            assert isinstance(self.optimizer, DeviceRates)
            self.optimizer.put_rates()
            loss, norm, bad = self.graph(images, visible)
        self.guard.note(bad)
        return loss, norm

    def _advance(self, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The device's work of a step: its loss, the norm of its gradient, and the flag of `NonfiniteGuard.note`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.before_step()
        parts = list(zip(images.chunk(self.accumulate), visible.chunk(self.accumulate), strict=True))
        total = torch.zeros((), device=self.device)
        for i, (some, seen) in enumerate(parts):
            with self._reduce_last(last=i == len(parts) - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    self.clock.mark("forward")
                    loss = self.model(some, seen)
                self.clock.mark("backward")
                self.scaler.scale(loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        self.clock.mark("optimizer")
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.clip)
        updating: Any = getattr(self.optimizer, "optim", self.optimizer)  # with ZeRO it is inside
        updating.found_inf, bad = self.guard.judge(total, norm)
        self.optimizer.step()  # by hand, not by the scaler: it knows of overflow in gradients alone
        self.scaler.update()
        self.clock.mark(None)
        return total, norm, bad

    def _check_graph(self) -> None:
        obstacles = {
            f"the device is {self.device.type}, not cuda": self.device.type != "cuda",
            f"the batch is cut into {self.accumulate} parts (accumulate)": self.accumulate > 1,
            "fp16 scales the loss by a number that the host keeps; use bf16": self.scaler.is_enabled(),
            f"{type(self.optimizer).__name__} takes its rates from the host; use LAMB or AdamW": not isinstance(
                self.optimizer, DeviceRates
            ),
            "ranks that exchange gradients are not supported": isinstance(self.model, DistributedDataParallel)
            or isinstance(getattr(self.model, "_orig_mod", None), DistributedDataParallel),
        }
        if found := [obstacle for obstacle, is_there in obstacles.items() if is_there]:
            raise ValueError(f"the step cannot be one CUDA graph: {'; '.join(found)}")

    def _reduce_last(self, last: bool):
        """Data parallelism exchanges gradients once a step, with the last part."""
        model = getattr(self.model, "_orig_mod", self.model)
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def resolve_precision(asked: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 where it is native, fp16 on older GPUs, fp32 on the CPU.

    Any other precision is used as asked for, with a warning where the device has no instructions for it.
    """
    if asked != "auto":
        if asked != "fp32":
            half, full = (matmul_rate(device, DTYPES[name]) for name in (asked, "fp32"))
            if is_emulated(half, full):
                log.warning(
                    "--precision %s: matrix products take this %s %.0f times as long as in fp32; use --precision auto",
                    asked, device.type, full / half,
                )  # fmt: skip
        return asked
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The model by torch.compile in this mode, or itself for "off".

    "max-autotune" times more kernels; the CUDA graphs that it would make besides are left to `TrainStep`.
    """
    if mode == "off":
        return model
    mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return torch.compile(model, mode=mode)  # type: ignore[return-value]
