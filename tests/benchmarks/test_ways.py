"""The published way of a step computes what the masked encoder does, and looks its visible cells up in every norm."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def ways():
    import ways

    return ways


class LookUps(TorchDispatchMode):
    """Counts the calls for which the host waits on a GPU, to learn how many cells are visible."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten.nonzero.default
        return op(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "kinds"),
    [("resnet10t", {"MaskedNormBatchNorm2d"}), ("convnext_tiny", {"LayerNorm2d", "LayerNorm"})],
)
def test_every_norm_of_the_published_way_looks_its_visible_cells_up(ways, name, kinds):
    shape, device = ways.Shape(name, 64, 0.5, 2, 32), torch.device("cpu")
    found = {}
    for way in (ways.WAYS["published"], replace(ways.WAYS["published"], published=False, plain_decoder=True)):
        model = ways.build(way, shape, device)
        images, seen = ways.inputs(model, shape, way, device)
        with LookUps() as look_ups:
            loss = model(images, seen)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[way.published] = look_ups.count, loss.detach(), gradients
        norms = [module for module in model.encoder.modules() if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))]
    assert {type(norm).__name__ for norm in norms} == kinds
    assert found[True][0] == len(norms)
    assert found[False][0] == 0
    torch.testing.assert_close(found[True][1:], found[False][1:], rtol=1e-4, atol=1e-5)


def test_a_step_takes_the_optimiser_that_is_asked_for(ways, one_thread):
    shape, cpu = ways.Shape("resnet10t", 64, 0.5, 1, 32), torch.device("cpu")
    model = ways.build(ways.Way(), shape, cpu)
    kinds = {asked: type(ways.train_step(ways.Way(), model, cpu, asked).optimizer) for asked in ("", "adamw")}
    assert [kind.__name__ for kind in kinds.values()] == ["Lamb", "AdamW"], "the method's, where none is named"
