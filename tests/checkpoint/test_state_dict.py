"""State dicts are found in whatever holds them, and loaded whole or not at all."""

import pytest
import torch
from torch import nn

from spark_fast.checkpoint.state_dict import load_strictly, strip_prefixes, tensors_of


def test_strict_loading_takes_the_models_own_names_alone():
    model, state = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    load_strictly(model, state)
    assert torch.equal(model.weight, state["weight"])
    with pytest.raises(ValueError, match=r"missing: weight; bias\. not in this model: module\.weight; module\.bias"):
        load_strictly(model, {f"module.{name}": torch.zeros_like(value) for name, value in state.items()})
    assert torch.equal(model.weight, state["weight"])


def test_every_kind_of_misfit_is_told_at_once():
    odd = {"weight": torch.zeros(3), "bias": "none", "more": torch.zeros(1)}
    message = (
        "the checkpoint does not fit this model. wrong shape: weight is (3,), the model's (3, 2). "
        "not a tensor: bias. not in this model: other; more"
    )
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_strictly(nn.Linear(2, 3), odd, ["other"])
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_tensors_lie_under_one_of_three_keys_or_are_the_whole(key):
    assert tensors_of({"epoch": 3, key: {"a": 1}}) == {"a": 1}
    assert tensors_of({"a": 1, key: torch.zeros(1)}).keys() == {"a", key}


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [("module.a.b", "a.b"), ("_orig_mod.module.a", "a"), ("a.module.b", "a.module.b"), ("modules.a", "modules.a")],
)
def test_only_prefixes_of_wrappers_are_taken_off(wrapped, plain):
    assert strip_prefixes(wrapped) == plain
