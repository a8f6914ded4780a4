"""FCMAE: the published code's own figures, for both encoders; and several masks of one image."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from spark_fast.fcmae import build_fcmae
from spark_fast.masking import sample_visible
from spark_fast.spark import build_spark
from spark_fast.training.optimizers.optim import build_optimizer, clip_gradients, set_rates
from spark_fast.training.schedule import Schedule
from spark_fast.weights.fcmae_keys import from_published
from tests.test_golden import recorded_images

CASES = ["fcmae_atto", "fcmae_atto_one_image"]
encoders = pytest.mark.parametrize("encoder", ["packed", pytest.param("masked", marks=pytest.mark.slow)])
cases = pytest.mark.parametrize("name", CASES)


def build(figures, state, encoder):
    model = build_fcmae(
        figures["model"],
        input_size=figures["input_size"],
        mask_ratio=figures["mask_ratio"],
        decoder_width=figures["decoder_width"],
        decoder_depth=figures["decoder_depth"],
        encoder=encoder,
    )
    assert model.num_visible == figures["len_keep"]
    found = from_published(state)
    ours = {name: name.replace(".", "_") for name in model.state_dict()}
    assert set(ours.values()) == set(found)
    own = model.state_dict()
    model.load_state_dict({name: found[key].reshape(own[name].shape) for name, key in ours.items()})
    return model.to(dtype=torch.float64, memory_format=torch.channels_last).train()


@encoders
@cases
def test_trajectory_equals_the_published_code(golden, name, encoder):
    figures, arrays, state = golden(name)
    model = build(figures, state, encoder)
    images, masks = recorded_images(figures, torch.float64), torch.from_numpy(arrays["masks"])
    settings = figures["optimizer"]
    total, decay = settings["total_steps"], settings["weight_decay"]
    optimizer = build_optimizer(settings["name"], model, settings["betas"][1])
    schedule = Schedule(settings["peak_lr"], settings["warmup_steps"], total, decay, decay, *model.recipe.schedule)
    seen = {"loss": [], "grad_norm": [], "lr": []}
    for step in range(total):
        rates = schedule.at(step)
        set_rates(optimizer, *rates)
        loss = model(images[step], masks[step])
        optimizer.zero_grad()
        loss.backward()
        norm = clip_gradients(model.parameters(), 0)
        optimizer.step()
        for key, value in (("loss", loss.detach()), ("grad_norm", norm), ("lr", rates[0])):
            seen[key].append(float(value))
    for key, values in seen.items():
        np.testing.assert_allclose(values, figures[key], rtol=1e-7, err_msg=key)
    final = {name.replace(".", "_"): value for name, value in model.state_dict().items()}
    zeros = {name: torch.zeros(shape) for name, shape in figures["parameters"].items()}
    where = {name: next(iter(from_published({name: value}))) for name, value in zeros.items()}
    for published, (norm, _) in figures["final_norm_and_sum"].items():
        value = final[where[published]].norm().item()
        assert value == pytest.approx(norm, rel=1e-6, abs=1e-9), published


@encoders
@cases
def test_features_and_prediction_equal_the_published_code(golden, name, encoder):
    figures, arrays, state = golden(name)
    model = build(figures, state, encoder)
    images, mask = recorded_images(figures, torch.float64)[0], torch.from_numpy(arrays["masks"][0])
    feature = model.encode(images, mask)[-1].detach()
    every = max(1, feature.shape[1] // 32)
    np.testing.assert_allclose(feature[:, ::every], arrays["feature"], rtol=1e-5, atol=1e-5)
    visible = model.visible_patches(images, mask)
    hidden = visible.complement()
    pixels = model.decode(model.encoder(images, visible), visible, hidden).detach()  # (M, 3, p, p)
    published = pixels.permute(0, 2, 3, 1).reshape(len(pixels), -1, 1, 1)  # in the order (row, column, channel)
    predicted = hidden.unpack(published)[:1, ::16]
    shown = hidden.mask[0].expand_as(predicted)  # what it predicts of visible patches enters nothing, and is not made
    np.testing.assert_allclose(predicted[shown], torch.from_numpy(arrays["prediction"])[shown], rtol=1e-5, atol=1e-5)


def test_the_published_names_under_weight_decay(golden):
    figures, _, state = golden("fcmae_atto")
    model = build(figures, state, "packed")
    decayed = {id(p) for p in build_optimizer("adamw", model, 0.95).param_groups[0]["params"]}
    ours = {name.replace(".", "_") for name, p in model.named_parameters() if id(p) in decayed}
    assert ours == set(from_published({name: state[name] for name in figures["optimizer"]["decayed"]}))


@pytest.mark.slow
@encoders
@pytest.mark.parametrize("kind", [build_fcmae, build_spark])
def test_masks_of_one_image_give_the_mean_of_their_losses_and_gradients(kind, encoder):
    """With running statistics in SparK's decoder: those of a batch would see the masks together."""
    torch.manual_seed(0)
    model = kind("convnext_zepto_rms", input_size=128, mask_ratio=0.75, decoder_width=32, encoder=encoder, check=False)
    model = model.double().eval()
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    for masks in (2, 3, 4):
        seen = sample_visible(1, 2, torch.arange(2), model.grid, model.num_visible, masks)  # (2*masks, L)
        together = gradients(model, images, seen)
        alone = [gradients(model, images, seen[k::masks]) for k in range(masks)]
        for both, each in zip(together, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(both, torch.stack(each).mean(0), rtol=1e-10, atol=1e-13)


def gradients(model, images, seen):
    model.zero_grad()
    loss = model(images, seen)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_pictures_of_several_masks_keep_what_each_shows():
    model = build_fcmae("resnet10t", input_size=64, mask_ratio=0.75, decoder_width=16, check=False).eval()
    images = torch.randn(3, 3, 64, 64)
    seen = sample_visible(0, 0, torch.arange(3), model.grid, model.num_visible, masks=4)
    filled = model.reconstruct(images, seen)
    repeated = images.repeat_interleave(4, 0)
    shown = model.visible_patches(images, seen).cells(64).expand_as(filled)
    assert torch.equal(filled[shown], repeated[shown])
    assert not torch.isclose(filled[~shown], repeated[~shown]).all()
    assert shown.view(3, 4, 3, 64, 64).sum(1).eq(1).all(), "each pixel is seen once"


def test_a_decoder_without_channels_or_blocks_is_refused():
    for options in ({"decoder_width": 0}, {"decoder_depth": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            build_fcmae("resnet10t", input_size=64, check=False, **options)


@pytest.mark.drill
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(["resnet10t", "convnext_zepto_rms", "test_efficientnet", "convnextv2_atto"]),
    grid=st.tuples(st.integers(1, 3), st.integers(2, 3)),
    ratio=st.floats(0.3, 0.8),
    masks=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_packed_equals_masked(name, grid, ratio, masks, seed):
    found = []
    for encoder in ("packed", "masked"):
        torch.manual_seed(seed)
        size = (32 * grid[0], 32 * grid[1])
        visible = int(grid[0] * grid[1] * (1 - ratio))
        hypothesis.assume(0 < visible * masks <= grid[0] * grid[1])
        model = build_fcmae(
            name, input_size=size, mask_ratio=ratio, decoder_width=16, encoder=encoder, check=False
        ).double()
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        found.append(gradients(model.train(), images, model.sample_masks(seed, 0, torch.arange(2), masks)))
    for packed, masked in zip(*found, strict=True):
        torch.testing.assert_close(packed, masked, rtol=1e-7, atol=1e-9)
