"""SparK from outside: what it accepts and refuses, its loss, its reconstruction, its features."""

import copy
import threading
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from spark_fast import build_spark
from spark_fast.encoder.verify import _randomise_constants
from spark_fast.masking import sample_visible

NETWORKS = ["resnet10t", "convnext_zepto_rms"]


pytestmark = pytest.mark.usefixtures("one_thread")


def small(name="resnet10t", size=64, **kwargs):
    torch.manual_seed(0)
    return build_spark(name, input_size=size, **{"mask_ratio": 0.5, "decoder_width": 32, **kwargs})


def lively(model):
    """Weights so large that every part of the model shows in its output, as after training."""
    _randomise_constants(model.encoder)  # timm starts residual branches at zero
    for module in (*model.decoder.modules(), *model.densify_projs):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    for token in model.mask_tokens:
        nn.init.normal_(token)
    return model


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    return lively(small(request.param)).double()


def pictures(batch=2, size=(64, 64), seed=0, dtype=torch.float64):
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def index_of(model, batch=2, seed=0):
    return sample_visible(seed, 0, torch.arange(batch), model.grid, model.num_visible)


def mask_of(index, grid):
    flat = torch.zeros(len(index), grid[0] * grid[1], dtype=torch.bool)
    return flat.scatter(1, index, True).view(-1, *grid)


def cells_of(mask):
    """(B, h, w) patches -> (B, 1, H, W) pixels."""
    return mask[:, None].repeat_interleave(32, 2).repeat_interleave(32, 3)


def test_a_mask_and_its_index_give_the_same_loss(model):
    index = index_of(model)
    with torch.no_grad():
        losses = [copy.deepcopy(model)(pictures(), v) for v in (index, mask_of(index, model.grid))]
    assert torch.equal(*losses)


def test_without_a_mask_one_of_the_right_size_is_drawn_anew(model):
    model, drawn = copy.deepcopy(model), []
    model.encoder.register_forward_pre_hook(lambda _, args: drawn.append(args[1].mask))
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [model(pictures(4)) for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    assert all((mask.flatten(1).sum(1) == model.num_visible).all() for mask in drawn)
    assert not torch.equal(*drawn)


def test_masks_that_keep_unequal_numbers_are_refused(model):
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])
    with pytest.raises(ValueError, match="same number of patches, at least one; got 1 to 2"):
        model(pictures(), mask)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_index_of_another_number_of_images_is_refused(model, rows):
    with torch.no_grad(), pytest.raises(ValueError, match=f"{rows}.*2|2.*{rows}"):
        model(pictures(2), torch.tensor([[0, 1]] * rows))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_a_mask_that_hides_nothing_is_refused(model):
    with torch.no_grad(), pytest.raises(ValueError, match="mask"):
        model(pictures(), torch.ones(2, 2, 2, dtype=torch.bool))


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 64\), got \(2, 3, 64, 96\)"):
        model(pictures(size=(64, 96)))


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 2, 2), (2, 4)])
def test_a_mask_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"visible must be bool \(2, 2, 2\) .* got torch.bool \(" + str(shape)[1:-1]):
        model(pictures(), torch.ones(shape, dtype=torch.bool))


def test_a_float64_model_takes_its_loss_in_float64(model):
    with torch.no_grad():
        assert copy.deepcopy(model)(pictures(), index_of(model)).dtype == torch.float64


@pytest.mark.parametrize("name", NETWORKS)
def test_under_bf16_autocast_the_loss_is_fp32_and_close(name):
    model = lively(small(name))
    images, index = pictures(dtype=torch.float32), index_of(model)
    with torch.no_grad():
        full = model(images, index)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images, index)
    assert full.dtype == half.dtype == torch.float32
    assert half != full, "autocast had no effect"
    assert half.item() == pytest.approx(full.item(), rel=2e-2)


def patch_values(images):
    """(B, 3, H, W) -> (B, h, w, 3*32*32), by a way of its own."""
    b, c, height, width = images.shape
    cut = images.reshape(b, c, height // 32, 32, width // 32, 32)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, height // 32, width // 32, -1)


anything = settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
@anything
def test_reconstruction_keeps_what_was_seen_and_fills_at_the_scale_of_what_was_not(model, seed, scale, shift):
    model, index = copy.deepcopy(model).eval(), index_of(model, seed=seed)
    mask, images = mask_of(index, model.grid), pictures(seed=seed)
    filled = model.reconstruct(images, index)
    seen = cells_of(mask).expand_as(images)
    assert torch.equal(filled[seen], images[seen]), "visible pixels are kept to the bit"
    assert (filled[~seen] != images[~seen]).all(), "every masked pixel is the decoder's"
    # the holes are not seen: only the scale of their content, per patch, reaches the filling
    other = torch.where(seen, images, images * scale + shift)
    torch.testing.assert_close(
        model.reconstruct(other, index)[~seen], filled[~seen] * scale + shift, rtol=1e-3, atol=1e-3
    )


@given(seed=st.integers(0, 10**6))
@anything
def test_the_loss_is_the_error_of_the_reconstruction_in_deviations_of_each_masked_patch(model, seed):
    model, index = copy.deepcopy(model).eval(), index_of(model, seed=seed)
    images, masked = pictures(seed=seed) * 3 + 1, ~mask_of(index, model.grid)
    deviation = (patch_values(images).var(dim=-1) + 1e-6).sqrt()  # unbiased
    error = patch_values(model.reconstruct(images, index)) - patch_values(images)
    per_patch = (error / deviation[..., None]).square().mean(-1)  # (B, h, w)
    with torch.no_grad():
        torch.testing.assert_close(model(images, index), per_patch[masked].mean(), rtol=1e-9, atol=0)


def test_reconstruction_takes_a_mask_as_well(model):
    index = index_of(model)
    pair = [copy.deepcopy(model).eval().reconstruct(pictures(), v) for v in (index, mask_of(index, model.grid))]
    assert torch.equal(*pair)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [64, (64, 96)])
def test_features_are_zero_where_masked_and_the_same_packed_or_masked(name, size):
    pair = [lively(small(name, size, encoder=kind)).double() for kind in ("packed", "masked")]
    pair[1].load_state_dict(pair[0].state_dict())
    index = index_of(pair[0], batch=3)
    images = pictures(3, pair[0].input_size)
    packed, masked = (model.encode(images, index) for model in pair)
    assert [f.shape[1] for f in packed] == pair[0].encoder.channels
    for level, (a, b) in enumerate(zip(packed, masked, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        cells = mask_of(index, pair[0].grid).repeat_interleave(8 >> level, 1).repeat_interleave(8 >> level, 2)
        assert a.shape[2:] == cells.shape[1:]
        assert (a.permute(0, 2, 3, 1)[~cells] == 0).all()
        assert (a.permute(0, 2, 3, 1)[cells] != 0).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_an_input_need_not_be_square(name):
    model = small(name, (64, 96), mask_ratio=0.6)
    assert model.grid == (2, 3)
    assert model.num_visible == 2
    images, index = pictures(size=(64, 96), dtype=torch.float32), index_of(model)
    assert model(images, index).isfinite()
    assert model.reconstruct(images, index).shape == images.shape
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 96\), got \(2, 3, 96, 64\)"):
        model(images.transpose(2, 3), index)


def test_a_change_in_a_hole_changes_no_feature_and_no_prediction(model):
    model, index = copy.deepcopy(model).eval(), index_of(model)
    images, seen = pictures(), cells_of(mask_of(index, model.grid))
    other = torch.where(seen, images, pictures(seed=1))
    for a, b in zip(model.encode(images, index), model.encode(other, index), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet51"}, r"unknown model 'resnet51'; did you mean .*resnet5\d"),
        ({"model": "qqqq"}, r"unknown model 'qqqq'; see timm\.list_models"),
        ({"encoder": "sparse"}, "unknown encoder 'sparse': choose one of packed, masked"),
        ({"decoder_width": 31}, "decoder_width 31 is too small: it is halved 5 times, so the smallest is 32"),
        ({"decoder_width": 0}, "decoder_width 0 is too small"),
        ({"decoder_width": -32}, "decoder_width -32 is too small"),
        ({"input_size": 70}, "input size 70x70 is not a multiple of the patch, 32 px"),
        ({"input_size": (64, 70)}, "input size 64x70 is not a multiple"),
        ({"input_size": 40}, "input size 40x40 is not a multiple of the patch, 32 px"),
        ({"input_size": 8}, "input size 8x8 is not a multiple of the patch, 32 px"),
        ({"input_size": "64"}, r"input_size must be a number of pixels or \(H, W\), got '64'"),
        ({"input_size": (64,)}, r"input_size must be a number of pixels or \(H, W\), got \(64,\)"),
        ({"input_size": 0}, r"input_size must be a number of pixels or \(H, W\), got 0"),
        ({"mask_ratio": 1.5}, "mask ratio must be between 0 and 1, got 1.5"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_spark(**{"model": "resnet10t", "input_size": 64, "mask_ratio": 0.5, "decoder_width": 32, **arguments})


def test_a_refused_build_leaves_the_network_as_it_was_and_one_in_an_encoder_is_named():
    network = timm.create_model("resnet10t", features_only=True)
    types = [type(m) for m in network.modules()]
    for wrong in ({"decoder_width": 16}, {"mask_ratio": 0.99}):
        with pytest.raises(ValueError, match=r"decoder_width|mask ratio"):
            build_spark(network, **{"input_size": 64, "mask_ratio": 0.5, "decoder_width": 32, **wrong}, check=False)
        assert [type(m) for m in network.modules()] == types
    build_spark(network, input_size=64, mask_ratio=0.5, decoder_width=32, check=False)
    with pytest.raises(ValueError, match="the network is in an encoder already: build a new one"):
        build_spark(network, input_size=64, mask_ratio=0.5, decoder_width=32, check=False)


@pytest.mark.parametrize("encoder", ["packed", "masked"])
def test_saved_as_a_whole_or_copied_a_model_is_the_same(encoder, tmp_path):
    model = small(encoder=encoder)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    images, index = pictures(dtype=torch.float32), index_of(model)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(images, index), model(images, index))
        other.encoder.network.conv1[0].weight.data.zero_()  # its own, and read by its own context
        assert not torch.equal(other(images, index), model(images, index))


def test_a_second_thread_is_refused_while_a_call_runs():
    model = small()
    inside, done, errors = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        done.wait()

    def first():
        with model.encoder.network.conv1[0].register_forward_pre_hook(wait):
            model(pictures(dtype=torch.float32))

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    try:
        model(pictures(dtype=torch.float32))
    except RuntimeError as error:
        errors.append(str(error))
    done.set()
    thread.join()
    assert errors == ["another thread is using this encoder: give each thread a copy.deepcopy of its own"]
    model(pictures(dtype=torch.float32))


@pytest.mark.parametrize(("patches", "wrong"), [([0, 0], 1), ([0, 4], 1), ([-1, 0], 1)])
def test_an_index_that_names_a_patch_twice_or_none_is_refused_with_its_row(model, patches, wrong):
    with pytest.raises(ValueError, match=rf"visible\[{wrong}\] is .* different patches from 0 to 3"):
        model(pictures(), torch.tensor([[1, 0], patches]))
    losses = [model(pictures(), torch.tensor([first, [0, 3]])).item() for first in ([1, 0], [0, 1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)  # in any order


def test_norms_that_torch_has_replaced_are_refused_where_they_would_take_holes_into_their_statistics():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small(encoder="masked"))
    with pytest.raises(RuntimeError, match="build with sync_batchnorm=True instead"):
        model.train()(pictures(dtype=torch.float32))


def test_at_the_coarsest_level_equal_widths_are_not_projected():
    assert isinstance(small(decoder_width=512).densify_projs[0], nn.Identity)
    projections = small(decoder_width=32).densify_projs
    assert [p.kernel_size for p in projections] == [(1, 1), (3, 3), (3, 3), (3, 3)]
    assert [(p.in_channels, p.out_channels) for p in projections] == [(512, 32), (256, 16), (128, 8), (64, 4)]


def test_a_width_that_is_no_multiple_of_the_patch_is_rounded_down_as_published(tmp_path):
    model, again = lively(small(decoder_width=48)), small(decoder_width=48)
    published = [48, 24, 12, 6, 3, 1]  # the published decoder.py: [width // 2**i for i in range(n + 1)]
    assert [(b.up_sample.in_channels, b.conv[-2].out_channels) for b in model.decoder.dec] == list(pairwise(published))
    assert [p.out_channels for p in model.densify_projs] == published[:4]
    images, index = pictures(dtype=torch.float32), index_of(model)
    model(images, index).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again.load_state_dict(torch.load(tmp_path / "model.pth"))
    with torch.no_grad():
        assert torch.equal(again.eval()(images, index), model.eval()(images, index))


def test_a_resnet_is_densified_by_batch_norms_and_a_convnext_by_layer_norms():
    assert all(isinstance(n, nn.BatchNorm2d) for n in small("resnet10t").densify_norms)
    convnext = small("convnext_zepto_rms")
    assert all(isinstance(n, nn.LayerNorm) for n in convnext.densify_norms)
    assert all(n.rounded and n.context is convnext.encoder.context for n in convnext.densify_norms)


@pytest.mark.parametrize("name", NETWORKS)
def test_mask_tokens_start_small_and_differ(name):
    model = small(name)
    for token, channels in zip(model.mask_tokens, reversed(model.encoder.channels), strict=True):
        assert token.shape == (1, channels, 1, 1)
        assert token.abs().max() <= 0.02
        assert token.abs().max() > 0.015, "cut at one deviation, not narrower"
        assert len(token.unique()) > channels // 2


@pytest.mark.parametrize("encoder", ["packed", "masked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_reaches_every_parameter(name, encoder):
    model = lively(small(name, encoder=encoder))
    model(pictures(dtype=torch.float32), index_of(model)).backward()
    missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missed
    odd = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.isfinite().all()]
    assert not odd
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not still
