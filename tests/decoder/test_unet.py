"""The decoder: widths, shapes and initialisation of the published one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spark_fast.decoder.unet import Decoder, ReLU6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(patch=8, width=64)


def test_convolutions_start_from_a_normal_of_deviation_002(decoder):
    weights = [m.weight.detach() for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 7
    for weight in weights:
        assert weight.mean().abs() < 5 * 0.02 / weight.numel() ** 0.5
        assert weight.std().item() == pytest.approx(0.02, rel=5 / weight.numel() ** 0.5)


def test_transposed_convolutions_start_from_kaimings_fan_out(decoder):
    for block in decoder.dec:
        weight = block.up_sample.weight.detach()  # (cin, cin, 4, 4)
        expected = (2 / (weight.shape[0] * 16)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=5 / weight.numel() ** 0.5)
        assert abs(expected - 0.02) > 0.01, "the two branches can be told apart"


def test_biases_start_at_zero_and_norms_at_the_identity(decoder):
    biases = [p for n, p in decoder.named_parameters() if n.endswith("bias")]
    assert len(biases) == 3 + 6 + 1  # transposed convolutions, norms, the last projection
    assert all((b == 0).all() for b in biases)
    assert all((m.weight == 1).all() for m in decoder.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("patch", "width"), [(2, 8), (4, 12), (32, 64), (32, 48), (8, 13)])
def test_widths_halve_and_resolution_doubles_with_every_block(patch, width):
    decoder, blocks = Decoder(patch, width), patch.bit_length() - 1
    assert [b.up_sample.in_channels for b in decoder.dec] == [width // 2**i for i in range(blocks)]
    assert [b.conv[-2].out_channels for b in decoder.dec] == [width // 2 ** (i + 1) for i in range(blocks)]
    levels = [torch.randn(2, width // 2**i, 3 * 2**i, 2 * 2**i) for i in range(min(blocks, 4))]
    assert decoder(levels).shape == (2, 3, 3 * patch, 2 * patch)


def test_every_level_is_added_where_it_belongs(decoder):
    torch.manual_seed(0)
    decoder.eval()
    levels = [torch.randn(2, 64 >> i, 2 << i, 2 << i) for i in range(3)]
    with torch.no_grad():
        x = decoder.dec[0](levels[0])
        x = decoder.dec[1](x + levels[1])
        expected = decoder.proj(decoder.dec[2](x + levels[2]))
        assert torch.equal(decoder(levels), expected)
        assert torch.equal(decoder(levels[:2]), decoder([*levels[:2], torch.zeros_like(levels[2])]))


@pytest.mark.parametrize("patch", [24, 12, 3])
def test_a_patch_that_is_no_power_of_two_is_refused(patch):
    with pytest.raises(ValueError, match=f"a power of two, got {patch}"):
        Decoder(patch, 96)


@pytest.mark.parametrize("width", [0, -8, 7, 1])
def test_a_width_that_leaves_a_block_without_channels_is_refused_with_the_smallest(width):
    with pytest.raises(ValueError, match=f"decoder_width {width} is too small: .* 3 times, so the smallest is 8"):
        Decoder(8, width)
    assert Decoder(8, 8).proj.in_channels == 1


def test_relu6_and_its_gradient_are_torchs_also_at_its_limits():
    values = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 3.0, 6.0, 7.0, float("inf"), float("nan")], dtype=torch.float64)
    got, expected = (values.clone().requires_grad_() for _ in range(2))
    mine, torchs = ReLU6(inplace=True)(got * 1), F.relu6(expected * 1)
    torch.testing.assert_close(mine, torchs, rtol=0, atol=0, equal_nan=True)
    for y in (mine, torchs):
        y.backward(torch.arange(1.0, 10, dtype=torch.float64))
    assert got.grad.tolist() == expected.grad.tolist()
