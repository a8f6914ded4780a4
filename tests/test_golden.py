"""The published code's own figures, for both encoders."""

import numpy as np
import pytest
import torch

from spark_fast import build_spark, load_spark_state_dict
from spark_fast.training.optimizers.optim import build_optimizer, clip_gradients, set_rates
from spark_fast.training.schedule import learning_rate, weight_decay

NETWORKS = ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "convnext_tiny"))]


def build(figures, state, encoder, dtype):
    model = build_spark(
        figures["model"],
        input_size=figures["input_size"],
        mask_ratio=figures["mask_ratio"],
        decoder_width=figures["decoder_width"],
        encoder=encoder,
        model_kwargs=figures["model_kwargs"],
    )
    load_spark_state_dict(model, state)
    assert model.num_visible == figures["len_keep"]
    return model.to(dtype=dtype, memory_format=torch.channels_last).train()


def recorded_images(figures, dtype):
    images = eval(figures["images"], {"numpy": np, "float32": np.float32})  # the recipe kept with the figures
    return torch.from_numpy(images).to(dtype)


@pytest.mark.parametrize("encoder", ["packed", pytest.param("masked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_trajectory_equals_the_published_code(golden, name, encoder):
    figures, arrays, state = golden(name)
    model = build(figures, state, encoder, torch.float64)
    images, masks = recorded_images(figures, torch.float64), torch.from_numpy(arrays["masks"])
    settings = figures["optimizer"]
    optimizer = build_optimizer(settings["name"], model, settings["betas"][1])
    total, seen = settings["total_steps"], {"loss": [], "grad_norm": [], "lr": [], "weight_decay": []}
    for step in range(total):
        lr = learning_rate(step, settings["peak_lr"], settings["warmup_steps"], total)
        decay = weight_decay(step, figures["weight_decay"][0], figures["weight_decay"][-1], total)
        set_rates(optimizer, lr, decay)
        loss = model(images[step], masks[step])
        optimizer.zero_grad()
        loss.backward()
        norm = clip_gradients(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        for key, value in (("loss", loss.detach()), ("grad_norm", norm), ("lr", lr), ("weight_decay", decay)):
            seen[key].append(float(value))
    for key, values in seen.items():
        np.testing.assert_allclose(values, figures[key], rtol=1e-7, err_msg=key)
    check_final_norms(model, figures)


def check_final_norms(model, figures):
    from spark_fast.weights.spark_keys import canonical_name

    final = {canonical_name(k): v for k, v in model.state_dict().items()}
    for name, (norm, _) in figures["final_norm_and_sum"].items():
        value = final[canonical_name(name)].double().norm().item()
        assert value == pytest.approx(norm, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("encoder", ["packed", "masked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_and_reconstruction_equal_the_published_code(golden, name, encoder):
    figures, arrays, state = golden(name)
    model = build(figures, state, encoder, torch.float64)
    images, mask = recorded_images(figures, torch.float64)[0], torch.from_numpy(arrays["masks"][0])
    for i, feature in enumerate(model.encode(images, mask)):
        expected = arrays[f"feature_{i}"]
        every = max(1, feature.shape[1] // 16)
        np.testing.assert_allclose(feature.detach().numpy()[:, ::every], expected, rtol=1e-5, atol=1e-5)
    picture = model.reconstruct(images, mask)[0].numpy()
    np.testing.assert_allclose(picture, arrays["reconstruction"].squeeze(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", ["packed", "masked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_first_loss_in_fp32(golden, name, encoder):
    figures, arrays, state = golden(name)
    model = build(figures, state, encoder, torch.float32)
    loss = model(recorded_images(figures, torch.float32)[0], torch.from_numpy(arrays["masks"][0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(figures["loss"][0], rel=1e-5)
