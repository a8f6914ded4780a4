import pytest
import torch
import torch.nn.functional as F

from spark_fast.encoder.conv.depthwise_cpu import depthwise_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [(7, 7), (3, 3), (1, 5)])
def test_depthwise_gradients_are_those_of_the_convolution(dtype, k):
    x, weight = torch.randn(3, 8, 12, 10).to(dtype), torch.randn(8, 1, *k).to(dtype)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    out = F.conv2d(*inputs, groups=8)
    grad = torch.randn(out.shape).to(dtype)
    expected = torch.autograd.grad(out, inputs, grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(depthwise_gradients(grad, x, weight), expected, strict=True):
        assert (got.double() - wanted).norm() / wanted.norm() < tolerance
    assert depthwise_gradients(grad, x, weight, (False, True))[0] is None
