"""LAMB against timm's, and skipped steps; whatever the layout in memory: `test_layout`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Lamb as TimmLamb

from spark_fast.training.optimizers.lamb import Lamb, norms

SHAPES = ((16, 8, 3, 3), (8, 4, 1, 1), (5,), (6, 7), ())
pytestmark = pytest.mark.usefixtures("one_thread")


def weights(dtype, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]
    made[3].zero_()  # no norm, so no trust ratio
    return [(w.to(memory_format=layout) if w.dim() == 4 else w).requires_grad_() for w in made]


def gradients(params, step, scale=1.0, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * scale
        p.grad = grad.to(memory_format=layout) if p.dim() == 4 else grad


@settings(max_examples=30)
@given(
    st.floats(1e-4, 0.1), st.floats(0.5, 0.95), st.floats(0.9, 0.9999), st.sampled_from([0.0, 0.04, 0.5]),
    st.sampled_from([1e-8, 1.0, 1e4]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_it_is_timms(lr, beta1, beta2, decay, scale, always_adapt, bias_correction):
    ours, theirs = weights(torch.float64), weights(torch.float64)
    settings_ = {"lr": lr, "betas": (beta1, beta2), "weight_decay": decay}
    settings_ |= {"always_adapt": always_adapt, "bias_correction": bias_correction}
    mine, other = Lamb(ours, **settings_), TimmLamb(theirs, **settings_, max_grad_norm=None)
    for step in range(5):
        gradients(ours, step, scale), gradients(theirs, step, scale)
        mine.step(), other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_step_that_is_to_be_skipped_changes_no_bit_whatever_the_gradients_are():
    params, untouched = weights(torch.float32), weights(torch.float32)
    optimizer, other = Lamb(params, weight_decay=0.1), Lamb(untouched, weight_decay=0.1)
    for step, bad in enumerate((True, False, True, False)):  # also the very first
        gradients(params, step, float("nan") if bad else 1.0)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        if not bad:
            gradients(untouched, step)
            other.step()
        assert all(torch.equal(a, b) for a, b in zip(params, untouched, strict=True))
    states = [torch.stack([v.sum() for s in o.state.values() for v in s.values()]) for o in (optimizer, other)]
    assert torch.equal(*states)
    assert [group["step"] for group in optimizer.param_groups] == [2.0]


def test_a_step_counts_in_place():
    params = weights(torch.float32)
    optimizer = Lamb(params)
    places = set()
    for step in range(3):
        gradients(params, step)
        optimizer.step()
        places.add(optimizer.param_groups[0]["step"].data_ptr())
    assert len(places) == 1
    assert optimizer.param_groups[0]["step"] == 3


shapes = st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=5)


@given(shapes, st.integers(0, 1000), st.sampled_from([1e-18, 1.0, 1e18]), st.booleans())
def test_each_is_the_root_of_the_sum_of_squares(shapes, seed, scale, channels_last):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) * scale for shape in shapes]
    if channels_last:
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    expected = [math.sqrt(math.fsum(x * x for x in t.flatten().tolist())) for t in tensors]
    torch.testing.assert_close(norms(tensors), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_finite_number_shows_in_its_own_norm_alone(bad):
    tensors = [torch.ones(4, 3), torch.ones(4, 3), torch.ones(5)]
    tensors[1][2, 1] = bad
    assert norms(tensors).isfinite().tolist() == [True, False, True]
