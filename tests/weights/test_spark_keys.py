"""Checkpoints of the published code: read whole under their own names, or refused by name."""

import re

import pytest
import torch

from spark_fast import build_spark, load_spark_state_dict
from spark_fast.weights.spark_keys import canonical_name, is_spark_name

NETWORKS = ["resnet10t", "convnext_zepto_rms"]


def small(name, seed=0):
    torch.manual_seed(seed)
    return build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32)


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return small(name)


@pytest.fixture(scope="module")
def published(name):
    """Other weights for the same network, under the names that the published code writes."""
    return {published_name(k): v for k, v in random_state(small(name, seed=1)).items()}


def random_state(model):
    generator = torch.Generator().manual_seed(2)
    return {
        k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else torch.full_like(v, 7)
        for k, v in model.state_dict().items()
    }


def published_name(name):
    """Our name -> the published one: timm's names for ResNets, the official ones for ConvNeXts."""
    if not name.startswith("encoder.network."):
        return re.sub(r"^decoder\.", "dense_decoder.", name)
    inner = name.removeprefix("encoder.network.")
    for ours, official in [
        (r"^stem_", "downsample_layers.0."),
        (r"^stages_(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages_(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    ]:
        inner = re.sub(ours, official, inner)
    return "sparse_encoder.sp_cnn." + inner


def assert_holds(model, published):
    own = model.state_dict()
    assert len(own) == len(published)
    for name, value in own.items():
        assert torch.equal(value, published[published_name(name)]), name


def assert_refused_unchanged(model, state, *messages):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        load_spark_state_dict(model, state)
    for message in messages:
        assert message in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_official_convnext_names_are_really_used():
    names = {published_name(k) for k in small("convnext_zepto_rms").state_dict()}
    for expected in ("downsample_layers.0.0.weight", "downsample_layers.3.1.bias", "stages.2.0.dwconv.weight",
                     "stages.0.0.pwconv1.weight", "stages.3.1.gamma"):  # fmt: skip
        assert f"sparse_encoder.sp_cnn.{expected}" in names


def test_every_tensor_of_a_published_checkpoint_arrives(name, published):
    model = small(name)
    load_spark_state_dict(model, published)
    assert_holds(model, published)


@pytest.mark.slow
@pytest.mark.parametrize("golden_name", ["resnet18", "convnext_tiny"])
def test_the_published_codes_own_list_of_names_is_read(golden, golden_name):
    figures, _, state = golden(golden_name)
    model = build_spark(figures["model"], input_size=64, mask_ratio=0.5, decoder_width=figures["decoder_width"])
    load_spark_state_dict(model, state)
    assert_holds(model, state)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_in_a_training_checkpoint_and_by_wrappers_it_is_the_same(name, published, prefix):
    model = small(name)
    load_spark_state_dict(model, {"epoch": 3, "module": {prefix + k: v for k, v in published.items()}})
    assert_holds(model, published)


def test_unused_buffers_and_the_configuration_are_ignored(name, published):
    model = small(name)
    unused = {k: torch.zeros(1, 3, 1, 1) for k in ("imn_m", "imn_s", "norm_black", "module.imn_m")}
    load_spark_state_dict(model, {**published, **unused, "config": {"mask_ratio": 0.6}})
    assert_holds(model, published)


@pytest.mark.parametrize("victim", ["mask_tokens.1", "dense_decoder.proj.bias", "densify_projs.0.weight"])
def test_a_missing_tensor_is_named(model, published, victim):
    state = {k: v for k, v in published.items() if k != victim}
    assert_refused_unchanged(model, state, "missing: " + victim.removeprefix("dense_"))


def test_a_missing_tensor_of_the_network_is_named(model, published):
    victim = next(k for k in published if k.startswith("sparse_encoder.") and published_name_of(model, k))
    state = {k: v for k, v in published.items() if k != victim}
    assert_refused_unchanged(model, state, "missing: " + published_name_of(model, victim))


def published_name_of(model, published):
    return next(k for k in model.state_dict() if published_name(k) == published)


def test_an_unknown_tensor_is_named_as_the_file_names_it(model, published):
    extra = "module.sparse_encoder.sp_cnn.attention.weight"
    assert_refused_unchanged(model, {**published, extra: torch.zeros(1)}, f"not in this model: {extra}")


@pytest.mark.parametrize("victim", ["mask_tokens.0", "dense_decoder.proj.weight"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(model, published, victim):
    own = model.state_dict()[victim.removeprefix("dense_")].shape
    other = torch.zeros(own[0] + 1, *own[1:])
    message = f"wrong shape: {victim.removeprefix('dense_')} is {tuple(other.shape)}, the model's {tuple(own)}"
    assert_refused_unchanged(model, {**published, victim: other}, message)


def test_all_kinds_of_misfit_are_told_at_once_and_long_lists_cut(model):
    other = {"mask_tokens.0": torch.zeros(3), **{f"stray{i}": torch.zeros(1) for i in range(5)}}
    missing = len(model.state_dict()) - 1
    assert_refused_unchanged(
        model, other, "wrong shape: mask_tokens.0", f"and {missing - 3} more", "not in this model: stray0", "and 2 more"
    )


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("module.dense_decoder.dec.0.up_sample.weight", "decoder_dec_0_up_sample_weight"),
        ("decoder.dec.0.up_sample.weight", "decoder_dec_0_up_sample_weight"),
        ("_orig_mod.mask_tokens.1", "mask_tokens_1"),
        ("sparse_encoder.sp_cnn.stages.2.8.pwconv1.weight", "encoder_network_stages_2_blocks_8_mlp_fc1_weight"),
        ("encoder.network.stages_2.blocks.8.mlp.fc1.weight", "encoder_network_stages_2_blocks_8_mlp_fc1_weight"),
        ("sparse_encoder.sp_cnn.layer1.0.conv1.weight", "encoder_network_layer1_0_conv1_weight"),
    ],
)
def test_published_names_and_ours_have_one_canonical_name(name, canonical):
    assert canonical_name(name) == canonical
    assert is_spark_name(name) == ("decoder" not in name), "a plain network may have a decoder, too"
