"""LAMB, AdamW and SGD, whatever the layout in memory of weights, gradients and moments."""

import copy

import pytest
import torch

from spark_fast.training.optimizers.adamw import AdamW
from spark_fast.training.optimizers.lamb import Lamb
from spark_fast.training.optimizers.layout import in_order, laid_out_as
from spark_fast.training.optimizers.sgd import SGD
from tests.training.optimizers.test_lamb import gradients, weights

LAYOUTS = (torch.contiguous_format, torch.channels_last)
KINDS = [(Lamb, {}), (AdamW, {"fused": True}), (SGD, {"fused": True, "momentum": 0.9, "nesterov": True})]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
def test_layouts_change_nothing_also_when_they_change_on_resume(gradient_layout, layout, kind, settings):
    results = []
    for later in (torch.contiguous_format, layout):
        params = weights(torch.float64)
        optimizer = kind(params, lr=0.01, weight_decay=0.1, **settings)
        gradients(params, 0)
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        params = [p.detach().to(memory_format=later) if p.dim() == 4 else p.detach() for p in params]
        optimizer = kind([p.requires_grad_() for p in params], **settings)
        optimizer.load_state_dict(state)
        gradients(params, 1, layout=gradient_layout)
        optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "settings"), KINDS[:2])
def test_the_kernel_on_a_cpu_is_given_nothing_that_it_would_copy(kind, settings, monkeypatch):
    given, kernel = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: given.extend(a[:4]) or kernel(*a, **k))
    params = weights(torch.float32, torch.channels_last)
    gradients(params, 0, layout=torch.channels_last)
    kind(params, lr=0.01, **settings).step()
    assert [len(tensors) for tensors in given] == [len(params)] * 4
    assert all(t.is_contiguous() for tensors in given for t in tensors)


def test_only_another_order_in_memory_is_copied():
    """The strides of a depthwise gradient differ in the dimension of one element, where they mean nothing."""
    depthwise = torch.arange(54.0).view(6, 1, 3, 3)
    weights = torch.empty(6, 1, 3, 3).to(memory_format=torch.channels_last)
    assert weights.stride() != depthwise.stride()
    same = laid_out_as(weights, depthwise)
    assert same.data_ptr() == depthwise.data_ptr()
    assert same.stride() == weights.stride()
    assert torch.equal(same, depthwise)
    full = torch.arange(108.0).view(6, 2, 3, 3)
    copied = laid_out_as(full.to(memory_format=torch.channels_last), full)
    assert copied.data_ptr() != full.data_ptr()
    assert torch.equal(copied, full)


def test_in_order_shares_memory():
    weights = torch.arange(108.0).view(6, 2, 3, 3).to(memory_format=torch.channels_last)
    for given, ordered in zip((weights, weights[0, 0]), in_order((weights, weights[0, 0])), strict=True):
        assert ordered.data_ptr() == given.data_ptr()
    assert in_order([weights])[0].shape == (6, 3, 3, 2)
