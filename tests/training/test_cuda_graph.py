"""One CUDA graph of the whole step: refused where there can be none; on a GPU, the same steps. And no step waits."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from spark_fast import build_spark
from spark_fast.masking import sample_visible
from spark_fast.reporting.step_timer import StepClock
from spark_fast.training.cuda_graph import StepGraph
from spark_fast.training.optimizers.optim import build_optimizer
from spark_fast.training.schedule import Schedule
from spark_fast.training.step import TrainStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCHEDULE = Schedule(peak_lr=0.01, warmup_steps=2, total_steps=10, weight_decay=0.04, weight_decay_end=0.2)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")


def stepper(device, name="resnet10t", kernels=None, optimizer="lamb", **settings):
    torch.manual_seed(0)
    model = build_spark(name, input_size=64, mask_ratio=0.5, decoder_width=32, check=False)
    model.encoder.context.kernels = kernels
    model.to(device, memory_format=torch.channels_last).train()
    settings = {"precision": "bf16", "clip": 5.0} | settings
    return TrainStep(model, build_optimizer(optimizer, model, 0.95), SCHEDULE, device=device, **settings)


def batches(model, count, device):
    """Images on the device; the mask is made there."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 4, 3, 64, 64, generator=generator).to(device)
    positions = torch.arange(4, device=device)
    for step, each in enumerate(images):
        seen = sample_visible(7, step, positions, model.grid, model.num_visible)
        yield step, each.contiguous(memory_format=torch.channels_last), seen


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({}, "the device is cpu"), ({"accumulate": 2}, "cut into 2 parts"), ({"precision": "fp16"}, "use bf16"),
     ({"optimizer": "sgd"}, "SGD takes its rates from the host; use LAMB or AdamW")],
)  # fmt: skip
def test_what_stands_in_the_way_of_a_graph_is_named(settings, reason):
    with pytest.raises(ValueError, match=f"cannot be one CUDA graph: .*{reason}"):
        stepper(CPU, cuda_graph=True, **settings)


def test_each_call_works_once_on_what_it_was_given_and_its_results_are_its_own(monkeypatch):
    """Stand-ins for a GPU's streams and graphs: a capture computes nothing, a replay what was captured."""
    done = []

    class Captured:
        def replay(self):
            for output, now in zip(graph._outputs, work(*graph._inputs), strict=True):
                output.copy_(now)

    class Stream:
        device = CPU

        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    @contextmanager
    def capture(captured, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "the loader's threads go on"
        yield
        done.pop()

    def work(images, visible):
        clock.mark("forward")
        done.append((float(images[0]), float(visible[0])))
        return images + visible, images * visible

    names = {"Stream": Stream, "CUDAGraph": Captured, "graph": capture, "current_stream": Stream}
    for name, stand_in in (names | {"stream": lambda stream: nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clock = StepClock(CPU)
    graph = StepGraph(work, CPU, clock)
    results = [graph(torch.full((2,), float(i)), torch.full((2,), 10.0)) for i in range(6)]
    assert done == [(float(i), 10.0) for i in range(6)]
    assert [(float(total[0]), float(product[0])) for total, product in results] == [(10 + i, 10 * i) for i in range(6)]
    with pytest.raises(ValueError, match=r"captured for \(2,\) torch.float32, got \(3,\) torch.float32"):
        graph(torch.ones(3), torch.ones(2))


@gpu
@pytest.mark.parametrize("kernels", [None, False])
@pytest.mark.parametrize("name", ["resnet10t", "convnext_zepto_rms"])
def test_the_host_never_waits_between_log_points(name, kernels):
    advance = stepper(CUDA, name, kernels)
    for batch in batches(advance.model, 2, CUDA):  # kernels are compiled, the optimiser's state is made
        advance(*batch)
    images = [batch[1] for batch in batches(advance.model, 3, CUDA)]
    positions, model = torch.arange(4, device=CUDA), advance.model
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, each in enumerate(images, start=2):
            advance(step, each, sample_visible(7, step, positions, model.grid, model.num_visible))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert advance.guard.bad_steps() == [False] * 5


@gpu
@pytest.mark.parametrize(
    ("name", "optimizer"), [("resnet10t", "lamb"), ("convnext_zepto_rms", "lamb"), ("convnext_zepto_rms", "adamw")]
)
def test_a_graph_takes_the_same_steps_also_as_rates_change(name, optimizer):
    found = []
    for cuda_graph in (False, True):
        advance = stepper(CUDA, name, optimizer=optimizer, cuda_graph=cuda_graph, precision="fp32")
        losses = [float(advance(*batch)[0]) for batch in batches(advance.model, 8, CUDA)]
        found.append((losses, list(advance.model.state_dict().values())))
        phases = advance.clock.read()
        assert ("graph" in phases) is cuda_graph
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    for ordinary, replayed in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(replayed, ordinary, rtol=1e-2, atol=1e-3)


@gpu
def test_a_graph_skips_a_bad_step_and_refuses_another_shape():
    advance = stepper(CUDA, cuda_graph=True)
    for step, images, seen in batches(advance.model, 7, CUDA):
        before = [p.detach().clone() for p in advance.model.parameters()]
        bad = step == 5
        advance(step, images * float("nan") if bad else images, seen)
        same = [torch.equal(p, q) for p, q in zip(advance.model.parameters(), before, strict=True)]
        assert all(same) is bad
    assert advance.guard.bad_steps() == [False] * 5 + [True, False]
    with pytest.raises(ValueError, match="the step was captured for"):
        advance(8, images[:2], seen[:2])
