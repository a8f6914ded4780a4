"""A network is found in whatever holds it: beneath dictionaries, and behind the names that wrappers put before its."""

import pytest
import torch

from spark_fast.weights.named_tensors import beneath, flatten, places_of, read_state, same_shape
from spark_fast.weights.spark_keys import ENCODER
from tests.weights.tiny import TwoConvolutions, tiny_spark

NETWORK = TwoConvolutions().state_dict()
SHAPES = {ENCODER + name.replace(".", "_"): value.shape for name, value in NETWORK.items()}


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [((4,), (4,), True), ((1, 4), (4,), True), ((1, 1, 1, 4), (4,), True), ((4, 1), (4,), False),
     ((8, 4), (8, 4, 1, 1), True), ((8, 4, 1, 1), (8, 4), True), ((8, 4, 1), (8, 4), False),
     ((8, 4, 3, 3), (8, 4, 3, 3), True), ((8, 4, 3, 3, 1), (8, 4, 3, 3), False), ((), (), True), ((1,), (), False)],
)  # fmt: skip
def test_shapes_that_mean_the_same_layer(found, wanted, same):
    assert same_shape(torch.Size(found), torch.Size(wanted)) is same


def behind(prefix):
    return {prefix + name: value for name, value in NETWORK.items()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (NETWORK, [""]),
        (behind("backbone."), ["backbone."]),
        ({"state_dict": behind("module.encoder_q.")}, ["state_dict.module.encoder_q."]),
        ({"net": {"trunk": behind("_orig_mod.")}, "epoch": 3, "fc.weight": torch.zeros(1)}, ["net.trunk._orig_mod."]),
        ({"student": NETWORK, "teacher": behind("model.")}, ["student.", "teacher.model."]),
        (NETWORK | behind("ema."), ["", "ema."]),
        ({"model": {**behind("a."), "a.conv2.weight": torch.zeros(1)}}, []),
        ({name: value for name, value in behind("a.").items() if "conv2" not in name}, []),
        ({"optimizer": NETWORK}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_the_places_are_those_where_every_tensor_lies_with_its_shape(content, expected):
    places = places_of(SHAPES, flatten(content))
    assert [place.prefix for place in places] == expected
    for place in places:
        assert {name: value.shape for name, value in place.tensors.items()}.items() >= SHAPES.items()


def test_counters_of_batches_need_not_be_there():
    tensors = {name: value for name, value in behind("a.").items() if "num_batches" not in name}
    assert [place.prefix for place in places_of(SHAPES, tensors)] == ["a."]


def test_official_names_are_translated_behind_the_prefix_as_well():
    tensors = {"backbone.downsample_layers.0.0.weight": torch.zeros(1), "backbone.stages.0.0.gamma": torch.zeros(1)}
    shapes = {ENCODER + name: torch.Size([1]) for name in ("stem_0_weight", "stages_0_blocks_0_gamma")}
    (place,) = places_of(shapes, tensors)
    assert (place.prefix, place.names[f"{ENCODER}stem_0_weight"]) == ("backbone.", "downsample_layers.0.0.weight")


def test_a_whole_model_is_found_as_a_whole_behind_a_prefix():
    model = tiny_spark().state_dict()
    found = read_state({"state_dict": {f"spark.{name}": value for name, value in model.items()}})
    assert (found.prefix, found.has_decoder, len(found.tensors)) == ("state_dict.spark.", True, len(model))
    with pytest.raises(ValueError, match=r"several models in it fit: a, b\. Choose one .*: #a or #b"):
        read_state({"a": model, "b": model})


def test_two_tensors_of_one_name_are_never_taken_one_for_the_other():
    with pytest.raises(ValueError, match=r"it has two tensors named a\.b"):
        flatten({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"conv\.weight and module\.conv\.weight name the same tensor"):
        read_state({"conv.weight": torch.zeros(1), "module.conv.weight": torch.ones(1)})


def test_dictionaries_without_end_are_refused():
    content = {"a": torch.zeros(1)}
    content["more"] = content
    with pytest.raises(ValueError, match="it nests more than 1000 dictionaries"):
        flatten(content)


def test_what_lies_beneath_a_prefix_comes_without_it():
    assert beneath({"a.b": 1, "ab": 2, "a.c.d": 3}, "a.") == {"b": 1, "c.d": 3}
