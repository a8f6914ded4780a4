"""Reconstruction pictures: input, visible part and filled-in image, side by side, and the model left as it was."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from spark_fast import build_spark
from spark_fast.errors import SettingsError
from spark_fast.reporting.reconstructions import (
    LINE,
    MEAN,
    NOTE,
    STD,
    TITLES,
    check_picture_channels,
    reconstruction_grid,
    save_png,
    titled,
)

PAD = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_spark("resnet10t", input_size=(64, 96), mask_ratio=0.5, decoder_width=32)


@pytest.fixture(scope="module")
def pixels():
    """(2, 3, 64, 96) uint8."""
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels):
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


def cut(grid, row, column):
    top, left = PAD + row * (64 + PAD), PAD + column * (96 + PAD)
    return grid[:, top : top + 64, left : left + 96].int()


def test_each_row_is_an_image_what_was_seen_of_it_and_what_was_made_of_it(model, pixels):
    grid = reconstruction_grid(model, normalised(pixels), seed=3, photographs=True)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, PAD + 2 * (64 + PAD), PAD + 3 * (96 + PAD))
    for row in range(2):
        image, visible, filled = (cut(grid, row, column) for column in range(3))
        assert (image - pixels[row].int()).abs().max() <= 1
        grey = (visible == 128).all(0)
        patches = grey.view(2, 32, 3, 32).float().mean((1, 3))
        assert sorted(patches.flatten().round().tolist()) == [0, 0, 0, 1, 1, 1], "half of the six patches are hidden"
        hidden = patches.round().bool().repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(visible[:, ~hidden], image[:, ~hidden])
        assert torch.equal(filled[:, ~hidden], image[:, ~hidden])
        assert (filled[:, hidden] != image[:, hidden]).any()


def test_the_masks_depend_on_the_seed_alone(model, pixels):
    images = normalised(pixels)
    first = reconstruction_grid(model, images, seed=3, photographs=True)
    torch.rand(5)
    assert torch.equal(first, reconstruction_grid(model, images, seed=3, photographs=True))
    assert not torch.equal(first, reconstruction_grid(model, images, seed=4, photographs=True))


def test_other_channels_are_shown_where_asked_for_and_one_as_grey(model, pixels):
    images = normalised(pixels)
    whole = reconstruction_grid(model, images, seed=3, photographs=True)
    assert torch.equal(reconstruction_grid(model, images, seed=3, channels=(2, 1, 0), photographs=True), whole.flip(0))
    assert torch.equal(
        reconstruction_grid(model, images, seed=3, channels=(1,), photographs=True), whole[1:2].expand(3, -1, -1)
    )


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_what_is_no_photograph_is_shown_in_the_range_that_it_uses(channels, shown):
    torch.manual_seed(0)
    model = build_spark(
        "test_resnet", input_size=(64, 96), mask_ratio=0.5, decoder_width=32, in_chans=channels, check=False
    )
    image = torch.rand(2, channels, 64, 96, generator=torch.Generator().manual_seed(0))
    dark = image * 1e-3 - 7
    grid = reconstruction_grid(model, dark, seed=3, photographs=False)
    expected = ((image[1] - 0.01) / 0.98).clamp(0, 1)[shown]
    torch.testing.assert_close(cut(grid, 1, 0) / 255, expected, atol=0.01, rtol=0)
    last = reconstruction_grid(model, dark, seed=3, channels=(channels - 1,), photographs=False)
    assert torch.equal(last, grid) == (channels == 1)


@pytest.mark.parametrize(
    ("channels", "in_chans", "message"),
    [
        ((0, 1), 3, "--picture_channels must be one or three of the channels 0 to 2, got 0 1$"),
        ((0, 1, 4), 4, "channels 0 to 3, got 0 1 4"),
        ((-1,), 4, "channels 0 to 3, got -1"),
    ],
)
def test_channels_that_cannot_be_shown_are_refused(channels, in_chans, message):
    with pytest.raises(SettingsError, match=message):
        check_picture_channels(channels, in_chans)
    for good in ((), (0,), (2, 1, 0), (0, 0, 0)):
        check_picture_channels(good, 3)


@pytest.mark.parametrize("training", [True, False])
def test_a_picture_leaves_mode_and_statistics_as_they_were(model, pixels, training):
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reconstruction_grid(model, normalised(pixels), seed=3, photographs=True)
    assert all(m.training is training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_png_holds_the_grid_to_the_bit(tmp_path):
    grid = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    save_png(grid, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), grid.permute(1, 2, 0).numpy())


@pytest.fixture
def texts(monkeypatch):
    """(x, y), text and anchor of everything that is written on a picture."""
    found, write = [], ImageDraw.ImageDraw.text

    def note(self, xy, text, fill, font, anchor):
        found.append((xy, text, anchor))
        write(self, xy, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return found


def test_a_picture_says_what_its_columns_are_and_whose_brightness_it_has(texts):
    grid = torch.randint(0, 200, (3, PAD + 2 * (224 + PAD), PAD + 3 * (224 + PAD)), dtype=torch.uint8)
    picture = titled(grid, "epoch 2, step 40, loss 0.8765")
    assert picture.dtype == torch.uint8
    top = 2 * PAD + 2 * LINE
    assert picture.shape == (3, top + grid.shape[1] + LINE + PAD, grid.shape[2])
    assert torch.equal(picture[:, top : top + grid.shape[1]], grid), "the pictures are as they were"
    centres = [PAD + i * (224 + PAD) + 112 for i in range(3)]
    assert texts[0] == ((PAD, PAD), "epoch 2, step 40, loss 0.8765", "la")
    assert texts[1] == ((PAD, top + grid.shape[1]), NOTE, "la")
    assert texts[2:] == [((x, PAD + LINE), title, "ma") for x, title in zip(centres, TITLES, strict=True)]
    for left in centres:
        assert (picture[:, PAD + LINE : top, left - 20 : left + 20] == 0).any(), "black on white"
    assert picture[:, :PAD].eq(255).all()


@pytest.mark.parametrize("side", [8, 32, 64, 100])
def test_small_pictures_are_enlarged_so_that_every_word_fits(texts, side):
    grid = torch.randint(0, 200, (3, side + 2 * PAD, PAD + 3 * (side + PAD)), dtype=torch.uint8)
    picture = titled(grid, "a_file_with_a_long_name_" * 9 + " step 4")
    factor = picture.shape[2] // grid.shape[2]
    assert picture.shape[2] == factor * grid.shape[2]
    assert factor == -(-128 // side)
    words = " ".join(text for _, text, _ in texts)
    assert words.replace(" ", "") == ("a_file_with_a_long_name_" * 9 + "step4" + NOTE + "".join(TITLES)).replace(
        " ", ""
    )
    font = ImageFont.load_default(13)
    assert max(font.getlength(text) for _, text, anchor in texts if anchor == "la") <= picture.shape[2]
    assert max(font.getlength(text) for _, text, anchor in texts if anchor == "ma") <= factor * side
    assert picture[:, -LINE - PAD :].eq(0).any()
