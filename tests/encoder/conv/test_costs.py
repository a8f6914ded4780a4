"""What the models of CPU and GPU say of each algorithm, and that the cheapest is chosen."""

import itertools

import pytest
from torch import nn

from spark_fast.encoder.conv.costs import GPU_RATES, algorithm_costs, choose_algorithm, gpu_costs
from spark_fast.encoder.conv.geometry import layer_axes


def gpu(b, channels, k=3, stride=1, groups=1, kernels=True, keep=0.4):
    padding = 0 if k == stride else k // 2
    layer = nn.Conv2d(channels, channels, k, stride, padding, groups=groups, device="meta")
    return gpu_costs(b, layer_axes(layer), layer.weight, groups, keep, kernels)


def cheapest(costs):
    return min(costs, key=costs.get)


@pytest.mark.parametrize(("k", "groups"), [(1, 1), (3, 1), (3, 4), (7, 4)])
@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_all_costs_but_that_of_dense_follow_the_visible_share(k, groups, b):
    layer = nn.Conv2d(4, 4, k, padding=k // 2, groups=groups)
    few, many = (algorithm_costs(b, layer_axes(layer), layer.weight, groups, keep) for keep in (0.2, 0.4))
    for name, cost in few.items():
        assert many[name] == pytest.approx(cost if name == "dense" else 2 * cost)
    assert ("halo" in few) == (1 < k <= 2 * b + 1)
    assert list(few) == ["pointwise_gemm"] or "dense" in few


def test_the_cheapest_is_chosen_and_a_depthwise_layer_is_read_directly_where_kernels_run():
    cases = itertools.product([1, 2, 4, 8], [(64, 1), (64, 64), (64, 4)], [0.1, 0.4, 1.0])
    for b, (c, groups), keep in cases:
        layer = nn.Conv2d(c, c, 3, padding=1, groups=groups)
        costs = algorithm_costs(b, layer_axes(layer), layer.weight, groups, keep)
        arguments = (b, layer_axes(layer), layer.weight, groups, keep)
        assert costs[choose_algorithm(*arguments)] == min(costs.values())
        on_gpu = gpu_costs(*arguments)
        with_kernels = choose_algorithm(*arguments, kernels=True)
        assert with_kernels == ("direct" if groups == c else cheapest(on_gpu))


def test_a_gpu_pays_for_the_copies_of_a_cell_and_computes_for_almost_nothing():
    """Stage 2 of ResNet-50: nine copies a cell, windows of 2.25 times the patch, or none."""
    layer = nn.Conv2d(128, 128, 3, padding=1, device="meta")
    arguments = (4, layer_axes(layer), layer.weight, 1, 0.4)
    assert choose_algorithm(*arguments) == "im2col"
    assert choose_algorithm(*arguments, kernels=True) == "direct"
    costs = gpu(4, 128)
    assert costs["direct"] < costs["halo"] < costs["im2col"]
    # two gathers and a sum of 128 channels, once the patch and once its window; three convolutions, of which the one
    # for the window's gradient computes at each of its 36 cells
    moved = 3 * 128 * (1 + 2.25) * 2 / GPU_RATES.memory
    read = (128 * 2.25 + 128) * 2 / GPU_RATES.memory
    work = 2 * 128 * 128 * 9
    assert costs["halo"] == pytest.approx(
        0.4 * (moved + 2 * max(read, work / GPU_RATES.products) + max(read, 2.25 * work / GPU_RATES.products))
    )
    # tiles of 256 x 128, and of 128 x 128 for the weight: 2*256*128 FLOPs for 256 + 128 numbers of 2 bytes
    wide, square = GPU_RATES.cache * 256 * 128 / (256 + 128), GPU_RATES.cache * 128 * 128 / (128 + 128)
    assert costs["direct"] == pytest.approx(0.4 * (2 * work / wide + work / square))


def test_an_implicit_gemm_reads_vectors_of_eight_channels():
    assert "direct" in gpu(4, 40)
    assert "direct" not in gpu(4, 36)
    assert "direct" not in gpu(4, 40, kernels=False)
    assert "direct" not in gpu(4, 40, groups=5)
    assert set(gpu(1, 64, k=5)) == {"dense", "direct"}, "it sees further than the next patch"


def test_index_tables_move_more_than_kernels_and_a_layer_inside_its_patch_moves_nothing():
    with_kernels, tables = gpu(4, 64), gpu(4, 64, kernels=False)
    assert with_kernels["halo"] < tables["halo"]
    assert with_kernels["im2col"] == tables["im2col"]
    assert gpu(1, 64)["im2col"] < gpu(1, 64, kernels=False)["im2col"], "the window of one output cell is what it reads"
    inside = gpu(2, 64, k=2, stride=2)
    assert cheapest(inside) == "halo"
    assert inside["halo"] == gpu(2, 64, k=2, stride=2, kernels=False)["halo"]


@pytest.mark.parametrize(("k", "groups"), [(1, 1), (3, 1), (3, 4), (7, 4)])
@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_a_gpu_s_costs_but_that_of_dense_follow_the_visible_share(k, groups, b):
    few, many = (gpu(b, 16, k, groups=groups, keep=keep) for keep in (0.2, 0.4))
    for name, cost in few.items():
        assert many[name] == pytest.approx(2 * cost) or (name == "dense" and cost < many[name] < 2 * cost)
    assert ("halo" in few) == (1 < k <= 2 * b + 1)
    assert list(few) == ["pointwise_gemm"] or "dense" in few
