"""A full checkpoint of the published code is gone on from as the published code does, or refused with the reason."""

import random
import re

import numpy as np
import pytest
import torch

import spark_fast
from spark_fast import build_spark
from spark_fast.checkpoint.file import random_state, restore
from spark_fast.errors import CheckpointError
from spark_fast.training.optimizers.optim import build_optimizer, clip_gradients, set_rates
from spark_fast.training.published_run import is_published, published_run, read_resumable
from spark_fast.training.schedule import learning_rate, weight_decay
from spark_fast.weights.spark_keys import canonical_name, spark_state_dict
from tests.test_golden import build, check_final_norms, recorded_images
from tests.weights.tiny import tiny_spark

pytestmark = pytest.mark.usefixtures("one_thread")
NOW = {"opt": "lamb", "bs": 4096, "model": "resnet50"}


def small(name, seed=0):
    torch.manual_seed(seed)
    return build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32, check=False)


def registered(state):
    """The names in the order in which the published code registers them: an official ConvNeXt's stems come first."""
    parts = ["sparse_encoder.sp_cnn.downsample_layers", "sparse_encoder", "dense_decoder", "densify_norms"]
    parts += ["densify_projs", "mask_tokens"]
    return sorted(state, key=lambda name: next(i for i, part in enumerate(parts) if name.startswith(part)))


def published(model, moments, step=7, epoch=3, **more):
    """What `save_checkpoint_with_meta_info_and_opt_state` writes; `moments`: published name -> those of its tensor."""
    state = spark_state_dict(model)
    order = registered(state)
    names = [n for n in order if not re.search(r"running_(mean|var)$|num_batches_tracked$", n)]
    exempt = {n for n in names if state[n].dim() == 1 or n.endswith(".bias") or re.search("mask_token|gamma", n)}
    groups = [[n for n in names if n not in exempt], [n for n in names if n in exempt]]
    numbers = {n: i for i, n in enumerate(n for group in groups for n in group)}
    common = {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.04,
        "step": step,
        "bias_correction": True,
    }
    common |= {
        "grad_averaging": True,
        "max_grad_norm": 5.0,
        "trust_clip": False,
        "always_adapt": False,
        "lr_scale": 1.0,
    }
    listed = [{**common, "params": [numbers[n] for n in group]} for group in groups]
    unused = {n: torch.zeros(1, 3, 1, 1) for n in ("imn_m", "imn_s", "norm_black")}
    return {
        "args": "{'bs': 4096,\n 'model': 'resnet50',\n 'lr': 0.0032}",
        "input_size": 64,
        "arch": "resnet50",
        "epoch": epoch,
        "performance_desc": "0.4321 0.5000",
        "module": {n: state[n] for n in order} | unused | {"config": {"mask_ratio": 0.5}},
        "optimizer": {"state": {i: moments(n) for n, i in numbers.items()}, "param_groups": listed},
        "is_pretrain": True,
        **more,
    }


def random_moments(model):
    shapes = {n: v.shape for n, v in spark_state_dict(model).items()}
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(2, *shape, generator=generator) for n, shape in shapes.items()}
    return made, lambda name: {"exp_avg": made[name][0], "exp_avg_sq": made[name][1]}


@pytest.mark.parametrize("network", ["resnet10t", "convnext_zepto_rms"])
def test_each_parameter_gets_its_own_moments_and_the_weights_and_the_epoch_come_too(tmp_path, network):
    source, target = small(network), small(network, seed=1)
    made, moments = random_moments(source)
    optimizer = build_optimizer("lamb", target, 0.95)
    content = published(source, moments)
    assert is_published(content)
    found = published_run(tmp_path / "a.pth", content, target, optimizer, NOW)
    assert (found["epoch"], found["loss"]) == (4, 0.5)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in found["model"].items())
    optimizer.load_state_dict(found["optimizer"])
    published_names = {canonical_name(name): name for name in made}
    for name, parameter in target.named_parameters():
        expected = made[published_names[canonical_name(name)]]
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected[0]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], expected[1]), name
    assert [group["step"].item() for group in optimizer.param_groups] == [7, 7]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", pytest.param("convnext_tiny", marks=pytest.mark.drill)])
def test_a_trajectory_broken_by_a_published_checkpoint_is_the_published_codes_own(golden, tmp_path, name):
    figures, arrays, state = golden(name)
    images, masks = recorded_images(figures, torch.float64), torch.from_numpy(arrays["masks"])
    settings = figures["optimizer"]
    total, losses = settings["total_steps"], []
    model = build(figures, state, "packed", torch.float64)
    optimizer = build_optimizer("lamb", model, settings["betas"][1])
    for step in range(total):
        if step == total // 2:
            ours = {canonical_name(n): optimizer.state[p] for n, p in model.named_parameters()}
            content = published(model, lambda name, ours=ours: dict(ours[canonical_name(name)]), step=step)
            model = build(figures, state, "packed", torch.float64)
            optimizer = build_optimizer("lamb", model, settings["betas"][1])
            found = published_run(tmp_path / "a.pth", content, model, optimizer, NOW)
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
        decay = weight_decay(step, figures["weight_decay"][0], figures["weight_decay"][-1], total)
        set_rates(optimizer, learning_rate(step, settings["peak_lr"], settings["warmup_steps"], total), decay)
        loss = model(images[step], masks[step])
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(losses, figures["loss"], rtol=1e-7)
    check_final_norms(model, figures)


def test_the_published_flag_goes_on_at_the_next_epoch_and_says_what_is_other_than_it_was(tmp_path, caplog):
    caplog.set_level("INFO", "spark_fast")
    model = small("resnet10t")
    torch.save(published(model, random_moments(model)[1], epoch=0), tmp_path / "a.pth")
    settings = {"model": "resnet10t", "input_size": 64, "mask_ratio": 0.5, "decoder_width": 32, "batch_size": 4}
    settings |= {"pipeline": "synthetic", "epochs": 2, "picture_every": 0, "device": "cpu", "max_steps": 1}
    done = spark_fast.pretrain(**settings, exp_dir=tmp_path / "run", resume=str(tmp_path / "a.pth"))
    steps = 1281167 // 4
    assert done.metrics["step"] == steps + 1
    assert f"resumed from {tmp_path / 'a.pth'} at step {steps} of {2 * steps}" in caplog.text
    assert "model was 'resnet50', is 'resnet10t'; bs was 4096, is 4" in caplog.text
    kept = torch.load(tmp_path / "run" / "ckpt-last.pth", weights_only=True)
    assert [group["step"].item() for group in kept["optimizer"]["param_groups"]] == [8, 8]


def broken(change):
    model = small("resnet10t")
    content = published(model, random_moments(model)[1])
    change(content)
    return content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["module"].pop("mask_tokens.0"), "it belongs to another model: it lacks 1 tensors of this one"),
        (lambda c: c["module"].update(a=torch.zeros(1)), r"has 1 unknown ones \(a\)"),
        (lambda c: c["module"]["mask_tokens.0"].fill_(torch.nan), "NaN or infinity, for example in mask_tokens.0"),
        (lambda c: c["optimizer"]["state"].pop(0), "its optimiser is another one, this run's lamb"),
        (lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(1.0)), "its optimiser is adamw, .*--opt adamw"),
        (
            lambda c: c["optimizer"]["state"][1].update(exp_avg=torch.zeros(1)),
            "exp_avg of .* is not a tensor of shape",
        ),
        (lambda c: c["optimizer"]["state"][1].update(exp_avg_sq=3), "exp_avg_sq of .* is not a tensor of shape"),
        (
            lambda c: c["optimizer"]["param_groups"][0].pop("step"),
            r"its optimiser's groups have no step count: \[None, 7\]",
        ),
        (
            lambda c: c["optimizer"]["param_groups"][0].update(params=[[0]]),
            "its optimiser has .* parameters, this model",
        ),
        (lambda c: c["optimizer"]["param_groups"].pop(), "its optimiser has .* parameters, this model"),
        (lambda c: c["optimizer"].update(param_groups=3), "its optimiser has no param_groups"),
    ],
)
def test_what_is_of_another_run_or_broken_is_refused_by_what_it_is(tmp_path, change, message):
    target = small("resnet10t", seed=1)
    optimizer = build_optimizer("lamb", target, 0.95)
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*{message}"):
        published_run(tmp_path / "a.pth", broken(change), target, optimizer, NOW)


ODD = [None, 3, -1, 10**30, "text", [], {}, [[1]], {"a": 1}, torch.zeros(1), torch.zeros(3, 3), True, float("nan")]


def changed_somewhere(content, rng):
    """The content with one value in it, at any depth, gone or another."""
    node = content
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            node = inner
        elif isinstance(node, dict) and rng.random() < 0.3:
            del node[key]
            return content
        else:
            node[key] = rng.choice(ODD)
            return content


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.drill)])
def test_whatever_is_changed_in_it_is_refused_in_words_or_the_run_goes_on(tmp_path, count):
    rng, path, refused = random.Random(count), tmp_path / "a.pth", 0
    source = tiny_spark()
    for _ in range(count):
        content = published(source, random_moments(source)[1])
        content = changed_somewhere(changed_somewhere(content, rng), rng)
        torch.save(content, path)
        model = tiny_spark(seed=1)
        optimizer = build_optimizer("lamb", model, 0.95)
        try:
            content = read_resumable(path)
            found = published_run(path, content, model, optimizer, NOW)
            restore(path, {**found, "random_state": random_state()}, model, optimizer)
        except CheckpointError:
            refused += 1
            continue
        set_rates(optimizer, 1e-3, 0.04)
        model(torch.zeros(2, 3, 32, 32)).backward()
        optimizer.step()
        assert isinstance(found["epoch"], int)
    assert 0 < refused < count


@pytest.mark.parametrize("missing", ["optimizer", "epoch"])
def test_a_file_of_weights_alone_is_no_run_and_the_message_says_what_it_lacks(tmp_path, missing):
    content = broken(lambda c: c.pop(missing))
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"not a checkpoint that a run can resume from: it lacks .*{missing}"):
        read_resumable(tmp_path / "a.pth")
