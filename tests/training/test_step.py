"""One step: gradients do not depend on how the batch is cut, and state stays in fp32 at any precision."""

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from spark_fast import build_spark
from spark_fast.masking import sample_visible
from spark_fast.training.optimizers.optim import build_optimizer
from spark_fast.training.schedule import Schedule, learning_rate, weight_decay
from spark_fast.training.step import TrainStep, resolve_precision

CPU = torch.device("cpu")
SCHEDULE = Schedule(peak_lr=0.1, warmup_steps=2, total_steps=10, weight_decay=0.04, weight_decay_end=0.2)


pytestmark = pytest.mark.usefixtures("one_thread")


class Regression(nn.Module):
    """(images, visible) -> loss, a mean over the batch; no batch statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.seen = []

    def forward(self, images, visible):
        self.seen.append((len(images), visible.clone()))
        features = self.head(self.layer(images).relu().mean((2, 3)))
        return (features - visible).square().mean()


def batch(n=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 9, (n, 4), generator=generator)


def stepper(model, precision="fp32", clip=5.0, accumulate=1, optimizer="sgd"):
    optimizer = build_optimizer(optimizer, model, 0.95)
    return TrainStep(model, optimizer, SCHEDULE, precision=precision, device=CPU, clip=clip, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(accumulate):
    models = [Regression().double() for _ in range(2)]
    images, visible = batch()
    results = [
        stepper(m, clip=0.0, accumulate=a)(0, images.double(), visible)
        for m, a in zip(models, (1, accumulate), strict=True)
    ]
    torch.testing.assert_close(*(float(r[0]) for r in results), rtol=1e-6, atol=0)
    torch.testing.assert_close(*(r[1] for r in results), rtol=1e-10, atol=0)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert [n for n, _ in models[1].seen] == [8 // accumulate] * accumulate
    assert torch.equal(torch.cat([v for _, v in models[1].seen]), visible), "each image with its own mask"


def test_a_step_sets_the_rates_of_its_number():
    advance = stepper(Regression())
    for step in (0, 1, 2, 9):
        advance(step, *batch())
        lr, decay = learning_rate(step, 0.1, 2, 10), weight_decay(step, 0.04, 0.2, 10)
        assert SCHEDULE.at(step) == (lr, decay)
        groups = advance.optimizer.param_groups
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(lr, decay), (lr, 0.0)]


def test_the_norm_told_is_the_one_before_clipping_and_the_update_is_of_the_clipped():
    free, clipped = Regression(), Regression()
    norm = stepper(free, clip=0.0)(0, *batch())[1]
    told = stepper(clipped, clip=0.01)(0, *batch())[1]
    assert told == norm
    assert norm > 0.01
    for a, b in zip(free.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad * (0.01 / norm))


def test_gradients_of_an_earlier_step_do_not_linger():
    model = Regression()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    fresh = Regression()
    assert stepper(model)(0, *batch())[1] == stepper(fresh)(0, *batch())[1]


def test_steps_lower_the_loss():
    advance = stepper(Regression())
    losses = [advance(2, *batch())[0].item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("asked", "rate", "warned"),
    [
        ("bf16", 2e12, ""),
        ("bf16", 0.7e12, ""),
        ("bf16", 1e10, "--precision bf16: matrix products take this cpu 100 times as long as in fp32"),
        ("fp16", 1e10, "--precision fp16: matrix products take this cpu 100 times as long as in fp32"),
        ("fp32", 1e10, ""),
    ],
)
def test_a_precision_asked_for_is_taken_with_a_warning_where_it_is_emulated(monkeypatch, caplog, asked, rate, warned):
    rates = {torch.float32: 1e12, torch.bfloat16: rate, torch.float16: rate}
    monkeypatch.setattr("spark_fast.training.step.matmul_rate", lambda device, dtype: rates[dtype])
    assert resolve_precision(asked, CPU) == asked
    assert bool(caplog.messages) == bool(warned)
    assert all(m.startswith(warned) and m.endswith("use --precision auto") for m in caplog.messages)


def test_on_the_cpu_auto_means_fp32():
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("name", ["resnet10t", "convnext_zepto_rms"])
def test_under_bf16_weights_gradients_and_optimiser_stay_in_fp32(name):
    torch.manual_seed(0)
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32)
    dtypes = []
    model.decoder.proj.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    advance = stepper(model, precision="bf16", optimizer="lamb")
    visible = sample_visible(0, 0, torch.arange(2), model.grid, model.num_visible)
    loss, norm = advance(1, torch.randn(2, 3, 64, 64), visible)
    assert dtypes == [torch.bfloat16]
    assert loss.dtype == norm.dtype == torch.float32
    assert loss.isfinite()
    assert norm.isfinite()
    assert not loss.requires_grad
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    floats = [b for b in model.buffers() if b.is_floating_point()]
    assert all(b.dtype == torch.float32 for b in floats)
    moments = [v for s in advance.optimizer.state.values() for k, v in s.items() if k != "step"]
    assert moments
    assert all(v.dtype == torch.float32 for v in moments)


def test_an_overflow_under_fp16_skips_the_update_and_lowers_the_scale():
    model = Regression()
    advance = stepper(model, precision="fp16")
    advance.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [p.detach().clone() for p in model.parameters()]
    advance(2, *batch())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert advance.scaler.get_scale() == 2.0**99


@pytest.mark.parametrize(("name", "kind"), [("resnet10t", nn.BatchNorm2d), ("convnext_atto", nn.LayerNorm)])
def test_under_bf16_norms_take_their_statistics_in_fp32(name, kind):
    """In bf16 the mean of numbers near 64 is off by up to 1/4."""
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32, check=False).train()
    norms = [m for m in model.modules() if isinstance(m, kind)]
    assert len(norms) > 4
    for norm in norms:
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
        x = 64 + 4 * torch.randn(4, norm.weight.numel(), 8, 8, generator=torch.Generator().manual_seed(0))
        x, channels = x.bfloat16(), 1
        if kind is nn.LayerNorm and not isinstance(norm, LayerNorm2d):
            x, channels = x.permute(0, 2, 3, 1), 3
        with torch.autocast("cpu", torch.bfloat16):
            out = norm(x)
        dims = (0, 2, 3) if kind is nn.BatchNorm2d else channels
        var, mean = torch.var_mean(x.double(), dims, correction=0, keepdim=True)
        torch.testing.assert_close(out.double(), (x - mean) / (var + norm.eps).sqrt(), rtol=8e-3, atol=8e-3)


def test_under_bf16_the_loss_is_taken_in_fp32():
    torch.manual_seed(0)
    model = build_spark("resnet10t", input_size=64, mask_ratio=0.5, decoder_width=32, check=False).train()
    predicted, decode = [], model.decode

    def noted(*args):
        predicted.append(decode(*args))
        return predicted[-1]

    model.decode = noted
    images, visible = torch.randn(2, 3, 64, 64), sample_visible(0, 0, torch.arange(2), (2, 2), 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, visible)
    assert predicted[0].dtype == torch.bfloat16
    model.decode, model.encoder.forward = lambda *_: predicted[0].double(), lambda *_: []
    exact = model(images.double(), visible)  # float64 from the same prediction on
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
