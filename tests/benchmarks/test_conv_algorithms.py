"""The constants that the benchmark of convolutions fits are those that its seconds were made of."""

import pytest

from spark_fast.encoder.conv.costs import GPU_RATES, gpu_costs
from spark_fast.encoder.conv.geometry import layer_axes


def test_rates_are_found_again_from_what_layers_take_by_them():
    from conv_algorithms import Options, fitted, layers, module

    options = Options(precision="bf16", batch=8, patches=5)
    truth = GPU_RATES._replace(memory=3.1e12, cache=7e12, products=420e12, grouped=30e12)
    rows = []
    for layer in layers(64):
        conv = module(layer, "meta")
        costs = gpu_costs(layer.b, layer_axes(conv), conv.weight, layer.groups, 0.4, True, truth)
        seconds = {name: cost * 8 * 5**2 * layer.b**2 for name, cost in costs.items()}
        rows.append({**layer._asdict(), "keep": 0.4, "seconds": seconds})
    found = fitted(rows, options)
    for name in ("memory", "cache", "products", "grouped"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.1)
