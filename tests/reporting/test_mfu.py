"""What the device could do: a rate that is its own, and what a run makes of it."""

from pathlib import Path

import pytest
import torch

from spark_fast.reporting import mfu as device
from spark_fast.reporting.flops import Cost
from spark_fast.reporting.mfu import MfuMeter, matmul_rate, peak_memory

CPU = torch.device("cpu")


def test_the_rate_is_the_median_of_products_long_enough_to_tell(monkeypatch):
    sides = []

    def product(a, b):
        """A device of 1e12 FLOP/s; the first product of a size and one in three later take twice as long."""
        assert a.dtype == b.dtype == torch.bfloat16
        sides.append(len(a))
        slow = sides.count(len(a)) == 1 or sides.count(len(a)) % 3 == 0
        return 2 * len(a) ** 3 / 1e12 * (2 if slow else 1)

    monkeypatch.setattr(device, "_seconds", product)
    assert matmul_rate(CPU, torch.bfloat16) == pytest.approx(1e12)
    assert sorted(set(sides)) == [256, 512, 1024, 2048], "2 * 2048^3 FLOP are the first that take 5 ms"


def test_a_fast_device_is_given_4096_at_most_and_a_slow_one_two_products(monkeypatch):
    for seconds, sides in ((1e-6, [256, 512, 1024, 2048, 4096]), (3.0, [256])):
        seen = []
        monkeypatch.setattr(device, "_seconds", lambda a, b, seen=seen, s=seconds: seen.append(len(a)) or s)
        assert matmul_rate(CPU, torch.float32) == 2 * sides[-1] ** 3 / seconds
        assert sorted(set(seen)) == sides
    assert len(seen) == 2


@pytest.mark.usefixtures("one_thread")
def test_measuring_changes_neither_random_state_nor_precision():
    state, precision = torch.get_rng_state(), torch.backends.cuda.matmul.fp32_precision
    assert 1e8 < matmul_rate(CPU, torch.float32) < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.cuda.matmul.fp32_precision == precision


def test_mfu_is_the_share_of_the_rate_that_the_task_needs():
    gauge = MfuMeter(Cost(whole=9e9, encoder=2e9, decoder=3e9), rate=6e12, device=CPU, world_size=4)
    found = gauge.read(images_per_second=400.0)  # 100 of this rank, 6 * 5e9 FLOP each
    assert found["mfu"] == pytest.approx(0.5)
    assert found["memory_gib"] == peak_memory(CPU) / 2**30


def test_on_a_cpu_memory_is_that_of_the_process_at_its_peak():
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here to compare with")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high_water = int(status["VmHWM"].split()[0]) * 1024
    assert peak_memory(CPU) == pytest.approx(high_water, rel=0.02)
