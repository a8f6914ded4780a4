"""The ranks of a run: one process per device, started by torchrun, or this process alone."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spark_fast.errors import SettingsError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Tensors that are exchanged may have any shape, the same on all ranks."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # a gloo group for flags: agreeing on one never touches the device
    store: dist.Store | None = None  # where ranks leave notes for each other, a connection of its own

    @property
    def main(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on any rank; exchanged between the hosts, without waiting for a GPU."""
        if self.control is None:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank; anything that pickles, exchanged between the hosts."""
        if self.control is None:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def max(self, value: Tensor) -> Tensor:
        """The maximum over the ranks of a tensor of any shape, on the device; written into `value` too."""
        if self.world_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks of a tensor of any shape, on the device."""
        return self.sum(value) / self.world_size if self.world_size > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a tensor of any shape, on the device."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def first(self, value: Tensor) -> Tensor:
        """The tensor of rank 0, of any shape, on the device."""
        if self.world_size > 1:
            value = value.clone()
            dist.broadcast(value, 0)
        return value

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 or dist.is_initialized():
            dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process is the first rank, as torchrun says; also before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def join(device: str, timeout: float = 600.0) -> Ranks:
    """Join the ranks that torchrun started, or stand alone.

    Args:
        timeout: seconds of silence after which the `Watchdog` of a rank gives up. Exchanges wait a little longer, so
            that the watchdog, which can name the cause, reports it first.

    Raises:
        SettingsError: a GPU is asked for and there is none, or fewer than ranks on this node.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no GPU here (torch.cuda.is_available() is False)")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local >= torch.cuda.device_count():
        raise SettingsError(
            f"rank {local} of this node has no GPU of its own: {torch.cuda.device_count()} GPUs are visible; "
            f"start that many processes per node"
        )
    where = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Ranks(0, 1, where)
    patience = timedelta(seconds=1.5 * timeout + 10)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
    except (RuntimeError, ValueError) as error:  # a port in use, a host that does not answer, a variable missing
        where_to = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"the ranks cannot meet at {where_to} ({reason}): is MASTER_PORT free, and MASTER_ADDR the host of rank 0? "
            f"torchrun finds a free port with --standalone, or with --rdzv-backend=c10d --rdzv-endpoint=HOST:0"
        ) from None
    store = dist.PrefixStore(_agree_on_a_start(store, rank, world_size, patience), store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=patience,
        device_id=where if on_gpu else None,
    )
    control = dist.new_group(backend="gloo", timeout=patience)
    assert not isinstance(control, int)  # which new_group gives to ranks that are not in it
    return Ranks(rank, world_size, where, control, dist.PrefixStore("notes", store.clone()))


def _agree_on_a_start(store: dist.Store, rank: int, world_size: int, patience: timedelta) -> str:
    """A name for this start of the ranks, the same on all of them and never used before.

    torchrun's store outlives a restart. Ranks that met under the old names would read the addresses of processes that
    are gone, and wait for them for ever. So rank 0 names the start. The others ask under a name of their own, to
    which nothing old can be the answer.
    """
    if rank:
        me = uuid.uuid4().hex
        store.set(f"hello/{rank}", me)
        store.wait([f"welcome/{me}"], patience)
        start = store.get(f"welcome/{me}").decode()
        store.set(f"{start}/here/{rank}", "")
        return start
    start, absent = uuid.uuid4().hex, set(range(1, world_size))
    deadline = time.monotonic() + patience.total_seconds()
    while absent:
        if time.monotonic() > deadline:
            raise SettingsError(f"ranks {sorted(absent)} have not started within {patience.total_seconds():.0f} s")
        for other in sorted(absent):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", start)
        absent = {other for other in absent if not store.check([f"{start}/here/{other}"])}
        time.sleep(0.02)
    return start
