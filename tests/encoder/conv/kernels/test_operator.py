"""Functions as operators: they run, compile, and say what they are."""

import torch

from spark_fast.encoder.conv.kernels.operator import operator


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
