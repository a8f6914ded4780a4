"""Parameter groups, clipping, and LAMB as timm's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Lamb as TimmLamb
from torch import nn

from spark_fast import build_spark
from spark_fast.method import METHODS, method_class
from spark_fast.training.optimizers.adamw import AdamW
from spark_fast.training.optimizers.lamb import Lamb
from spark_fast.training.optimizers.optim import build_optimizer, clip_gradients, parameter_groups, set_rates
from spark_fast.training.optimizers.sgd import SGD


@pytest.mark.parametrize("name", ["resnet10t", "convnext_zepto_rms"])
def test_vectors_biases_mask_tokens_and_layer_scale_do_not_decay(name):
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32)
    names = {id(p): n for n, p in model.named_parameters()}
    decaying, exempt = (
        {names[id(p)] for p in group["params"]} for group in sorted(parameter_groups(model), key=lambda g: -g["decays"])
    )
    assert decaying | exempt == set(names.values())
    assert not decaying & exempt
    parameters = dict(model.named_parameters())
    assert all(parameters[n].dim() == 4 or n.endswith(("fc1.weight", "fc2.weight")) for n in decaying)
    assert {f"mask_tokens.{i}" for i in range(4)} <= exempt
    assert all(n in exempt for n, p in parameters.items() if p.dim() == 1)
    assert any(n.endswith("gamma") for n in exempt) == name.startswith("convnext")


def test_names_decide_where_shapes_do_not():
    model = nn.ParameterDict(
        {k: torch.ones(1, 4, 1, 1) for k in ("gamma", "mask_token", "cls_token", "pos_embed", "weight")}
    )
    model["frozen"] = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    decaying, exempt = parameter_groups(model)
    assert [id(p) for p in decaying["params"]] == [id(model["weight"])]
    assert len(exempt["params"]) == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_gain_of_no_dimension_is_decayed_as_published(method):
    """NFNets have such; only vectors are exempt by their shape."""
    decays = method_class(method).recipe.decays
    assert decays("stages.0.skipinit_gain", torch.tensor(0.0))
    assert not decays("stages.0.norm.weight", torch.zeros(4))


def test_rates_are_written_into_both_groups_and_decay_into_one():
    optimizer = build_optimizer("adamw", nn.Linear(2, 2), 0.9)
    set_rates(optimizer, 0.5, 0.25)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("adamw", AdamW), ("sgd", SGD)])
def test_optimizers_are_those_of_timm_and_torch(name, kind):
    optimizer = build_optimizer(name, nn.Linear(2, 2), 0.77)
    assert type(optimizer) is kind
    if name != "sgd":
        assert all(g["betas"] == (0.9, 0.77) for g in optimizer.param_groups)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'adam': choose one of lamb, adamw, sgd"):
        build_optimizer("adam", nn.Linear(2, 2), 0.9)


def with_gradients(scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for p in parameters:
        p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator) * scale
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last one has no gradient


@given(scale=st.floats(1e-6, 1e6), max_norm=st.floats(0.01, 100), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_clipping_scales_all_gradients_together_and_leaves_small_ones(scale, max_norm, seed):
    parameters = with_gradients(scale, seed)
    before = [p.grad.clone() for p in parameters[:-1]]
    norm = math.sqrt(sum(g.square().sum().item() for g in before))
    assert clip_gradients(parameters, max_norm).item() == pytest.approx(norm, rel=1e-9)
    for p, g in zip(parameters[:-1], before, strict=True):
        if norm <= max_norm * (1 - 1e-9):
            assert torch.equal(p.grad, g), "to the bit"
        else:
            torch.testing.assert_close(p.grad, g * (max_norm / norm), rtol=1e-9, atol=0)


def test_without_a_limit_gradients_stay_and_their_norm_is_told():
    parameters = with_gradients(1e3)
    before = [p.grad.clone() for p in parameters[:-1]]
    assert clip_gradients(parameters, 0.0) > 100
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters[:-1], before, strict=True))


def test_gradients_of_zero_stay_zero():
    parameters = with_gradients(0.0)
    assert clip_gradients(parameters, 5.0) == 0
    assert all((p.grad == 0).all() for p in parameters[:-1])


def test_lamb_with_our_clipping_is_timms_lamb_with_its_own():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    theirs = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizer("lamb", ours, 0.95)
    other = TimmLamb(parameter_groups(theirs), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=0.5)
    clipped = []
    for step in range(6):
        for optimizer in (mine, other):
            set_rates(optimizer, 0.01 * (step + 1), 0.04)
        x = torch.randn(16, 6, dtype=torch.float64) * (0.01 if step == 3 else 3)
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            (model(x) * 10 ** (step % 2)).square().mean().mul(0.001 if step == 3 else 1).backward()
        clipped.append(clip_gradients(ours.parameters(), 0.5).item() > 0.5)
        mine.step()
        other.step()
    assert any(clipped)
    assert not all(clipped)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
