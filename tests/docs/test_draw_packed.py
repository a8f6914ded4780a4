"""The picture of docs/explanation/how_it_works.md is drawn from what the encoder does."""

import pytest
import torch
from PIL import Image

from docs.generate import draw_packed
from docs.generate.draw_packed import HOLE, NOTHING, arrange


@pytest.mark.parametrize(("grid", "b", "ratio"), [((4, 5), 4, 0.6), ((3, 3), 1, 0.5), ((1, 2), 2, 0.5)])
def test_a_window_is_what_the_masked_map_has_around_its_patch(grid, b, ratio):
    drawn = arrange(grid, b, ratio, seed=1)
    hidden = (drawn.dense == HOLE).all(-1, keepdim=True)
    around = torch.nn.functional.pad(drawn.dense.where(~hidden, NOTHING), (0, 0, 1, 1, 1, 1), value=NOTHING)
    visible = [(y, x) for y in range(grid[0]) for x in range(grid[1]) if not hidden[y * b, x * b]]
    assert len(visible) == len(drawn.packed) == len(drawn.windows)
    for (y, x), patch, window in zip(visible, drawn.packed, drawn.windows, strict=True):
        assert torch.equal(patch, drawn.dense[y * b : (y + 1) * b, x * b : (x + 1) * b])
        assert torch.equal(window, around[y * b : (y + 1) * b + 2, x * b : (x + 1) * b + 2])


def test_every_visible_patch_has_its_own_colour():
    drawn = arrange((4, 5), 4, 0.6, seed=1)
    assert len(drawn.packed.flatten(0, 2).unique(dim=0)) == len(drawn.packed)


def test_the_command_draws_every_panel(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    assert draw_packed.main(["--out", str(tmp_path / "a.png"), "--grid", "2", "3"]) == 0
    assert "2 visible patches" in capsys.readouterr().out
    image = Image.open(tmp_path / "a.png").convert("RGB")
    for third in range(3):  # the first patch's red fills a part of each
        left = third * image.width // 3
        panel = image.crop((left, 0, left + image.width // 3, image.height))
        reds = sum(count for count, (r, g, b) in panel.getcolors(1 << 20) if r > 200 and g < 80 and b < 80)
        assert reds > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "0", "3"], "--grid and --cells must be 1 or more, got 0 3 and 4"),
        (["--mask_ratio", "1.5"], "mask ratio must be between 0 and 1"),
        (["--out", "a.jpg"], "a.jpg must end with .png"),
    ],
)
def test_what_cannot_be_drawn_is_named(words, message, capsys):
    assert draw_packed.main(words) == 2
    assert message in capsys.readouterr().err
