"""Rates on the device: the same steps as with those of the host, read from one place, and none in a checkpoint."""

import pytest
import torch

from spark_fast.training.optimizers.adamw import AdamW
from spark_fast.training.optimizers.lamb import Lamb

KINDS = pytest.mark.parametrize(("kind", "settings"), [(Lamb, {}), (AdamW, {"fused": True})])


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, 3, 3), (5, 4), (3,), (2, 2)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in params[:-1]:  # the last has none
        p.grad = torch.randn(p.shape, generator=generator) * scale


def build(kind, params, settings):
    return kind([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}], **settings)


@KINDS
@pytest.mark.parametrize("skips", [False, True])
def test_they_are_those_of_the_host_as_they_change(kind, settings, skips):
    both = [weights(), weights()]
    on_device, on_host = (build(kind, params, settings) for params in both)
    places = set()
    for step in range(5):
        for params, optimizer in zip(both, (on_device, on_host), strict=True):
            bad = skips and step == 2
            give_gradients(params, step, float("nan") if bad else 1.0)
            optimizer.found_inf = torch.tensor(float(bad)) if skips else None
            for group, decay in zip(optimizer.param_groups, (0.1 + step, 0.0), strict=True):
                group.update(lr=0.01 * (step + 1), weight_decay=decay)
        on_device.put_rates()
        places.add(tuple(rate.data_ptr() for rates in on_device.rates for rate in rates))
        on_device.step()
        on_host.step()
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert len(places) == 1, "a graph reads them there"
    assert not torch.equal(both[0][0], weights()[0])


@KINDS
def test_a_checkpoint_is_the_same_with_and_without(kind, settings):
    states = []
    for puts in (False, True):
        params = weights()
        optimizer = build(kind, params, {"lr": 0.01, **settings})
        give_gradients(params, 0)
        if puts:
            optimizer.put_rates()
        optimizer.step()
        states.append(optimizer.state_dict())
    torch.testing.assert_close(*(state["state"] for state in states))
    groups = [state["param_groups"] for state in states]
    assert groups[0] == groups[1]
    assert all(isinstance(group["lr"], float) for group in groups[1]), "a number"
