"""Functions as operators: they run, compile, and say what they are."""

import pytest
import torch

from spark_fast.encoder.conv.kernels.operator import operator, with_gradient


def doubled_by_a_test(x):
    return x * 2


def test_a_function_becomes_an_operator_that_a_whole_graph_takes():
    made = operator("(Tensor x) -> Tensor")(doubled_by_a_test)
    torch.library.register_fake("spark_fast::doubled_by_a_test", torch.empty_like)
    assert str(made) == "spark_fast.doubled_by_a_test.default"
    x = torch.arange(3.0)
    torch.library.opcheck(made, (x,))
    compiled = torch.compile(lambda x: made(x) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(x).tolist() == [1, 3, 5]


def power_by_a_test(x, power):
    return x**power


def keep(ctx, inputs, output):
    x, ctx.power = inputs
    ctx.save_for_backward(x)


def gradient(ctx, grad):
    return grad * ctx.power * ctx.saved_tensors[0] ** (ctx.power - 1), None


def test_an_operator_gets_a_gradient_of_the_first_order():
    made = operator("(Tensor x, int power) -> Tensor")(power_by_a_test)
    torch.library.register_fake(made, lambda x, power: torch.empty_like(x))
    function = with_gradient(made, keep, gradient)
    compiled = torch.compile(lambda x, power: function(x, power), fullgraph=True, backend="aot_eager")
    for run in (function, compiled):
        x = torch.arange(3.0, requires_grad=True)
        run(x, 3).sum().backward()
        assert x.grad.tolist() == [0, 3, 12]
    (grad,) = torch.autograd.grad(function(x, 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
