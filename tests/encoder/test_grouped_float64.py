import pytest
import torch
import torch.nn.functional as F

from spark_fast.encoder.grouped_float64 import FastGroups


@pytest.mark.parametrize(
    ("c", "o", "groups", "k", "stride", "padding", "dilation"),
    [
        (8, 8, 8, (3, 3), 1, 1, 1),
        (8, 16, 4, (3, 3), 2, 1, 1),
        (8, 8, 8, (1, 5), 1, (0, 2), 1),
        (6, 6, 3, (3, 3), 1, 2, 2),
    ],
)
def test_grouped_convolutions_are_those_of_pytorch(c, o, groups, k, stride, padding, dilation):
    x = torch.randn(2, c, 9, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(o, c // groups, *k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(o, dtype=torch.float64, requires_grad=True)

    def run():
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weight, bias])]

    expected = run()
    with FastGroups():
        got = run()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
