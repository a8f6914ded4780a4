"""The page that shows why sparse matters says what the command computes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from docs.generate import draw_mask_pattern
from docs.generate.draw_mask_pattern import Options, averaging, patterns, table

PAGE = Path(draw_mask_pattern.__file__).parents[1] / "explanation" / "why_sparse.md"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found():
    return patterns(Options())


def test_the_table_of_the_page_is_what_is_computed(found):
    assert table(found) in PAGE.read_text()


def test_the_packed_mask_stays_and_the_dense_one_only_grows(found):
    mask = found["input"][0]
    shares = []
    for dense, packed in found.values():
        scale = len(mask) // len(packed)
        assert torch.equal(packed, mask[::scale, ::scale])
        assert not (packed & ~dense).any()
        shares.append(dense.float().mean().item())
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1


@pytest.mark.parametrize("model", ["resnet10t", "convnext_atto"])
def test_a_cell_is_reached_where_a_change_of_visible_pixels_changes_it(model):
    network = averaging(model)
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    pixels[..., 32:, :32] = 1
    features = network(pixels)[0]
    assert torch.equal(features == network(2 * pixels)[0], features == 0)
    assert (features > 0).any()


def test_the_command_draws_and_prints(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    words = ["--model", "resnet10t", "--layers", "conv1", "layer1.0", "--input_size", "128"]
    assert draw_mask_pattern.main([*words, "--out", str(tmp_path / "a.png")]) == 0
    assert "| layer1.0 | 32 x 32 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "a.png").size[0] > 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "stage9"], "resnet10t has no layer stage9"),
        (["--layers", "conv1", "--input_size", "100"], "not a multiple of the patch"),
        (["--layers", "conv1", "--mask_ratio", "2"], "mask ratio must be between 0 and 1"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, capsys, words, message):
    assert draw_mask_pattern.main(["--model", "resnet10t", *words, "--out", str(tmp_path / "a.png")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
