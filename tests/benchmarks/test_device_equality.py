"""The verdict on the packed encoder: flips of a ReLU at some seeds do not decide it, a fault at all of them does."""

import pytest
import torch

# of the fp32 gradient at six seeds, on a CPU: a flip in both encoders, in packed alone, in none
MASKED = [9.69e-04, 6.90e-03, 1.00e-03, 6.84e-06, 7.70e-06, 6.48e-03]
PACKED = [9.69e-04, 7.37e-03, 1.00e-03, 5.09e-03, 6.45e-06, 6.48e-03]


@pytest.fixture
def device_equality():
    import device_equality

    return device_equality


def judged(device_equality, monkeypatch, masked, packed):
    off = {(encoder, "loss"): [1e-8] * 6 for encoder in ("masked", "packed")}
    off |= {("masked", "gradient"): masked, ("packed", "gradient"): packed}
    monkeypatch.setattr(device_equality, "distances", lambda *_: off)
    shape = device_equality.Shape("resnet50", 64, 0.5, 8)
    return device_equality.equality(shape, "fp32", 6, torch.device("cpu"))


def test_a_flip_at_one_seed_does_not_condemn(device_equality, monkeypatch):
    row = judged(device_equality, monkeypatch, MASKED, PACKED)
    assert row["gradient ratio"] == pytest.approx(1, abs=0.01)
    assert row["packed gradient off by"] == pytest.approx((1.00e-03 + 5.09e-03) / 2)


def test_a_fault_at_every_seed_does(device_equality, monkeypatch):
    faulty = [off + 2e-2 for off in PACKED]
    with pytest.raises(AssertionError, match="the packed gradient is further off"):
        judged(device_equality, monkeypatch, MASKED, faulty)
    with pytest.raises(AssertionError, match="the packed gradient is further off"):
        judged(device_equality, monkeypatch, MASKED, [float("nan")] * 6)
