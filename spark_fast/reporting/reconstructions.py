"""Pictures of what the model fills in: input, what the network sees, prediction, side by side, with titles."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from spark_fast.encoder import VisiblePatches
from spark_fast.errors import DataError, ImageError, SettingsError
from spark_fast.evaluation_mode import evaluation_mode
from spark_fast.files import atomic_write
from spark_fast.method import Method
from spark_fast.pipelines.transforms.bands.band_augment import resized_bands
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise, as_batch
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.pipelines.transforms.crops import centre_box
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.resize import MEAN, STD, Normalise, resized_crop

TITLES = ("input", "what the network sees", "prediction")
NOTE = (
    "Brightness and contrast of hidden patches are the input's: the loss is in units of each patch's mean and deviation"
)
PAD = 4  # white pixels around each picture
COLUMN = 128  # pixels that a column is wide at least: smaller pictures are enlarged
FONT = 13  # its height in pixels
LINE = FONT + 4


def reconstruction_grid(
    model: Method,
    images: Tensor,
    seed: int,
    num_visible: int | None = None,
    channels: tuple[int, ...] = (),
    *,
    photographs: bool,
) -> Tensor:
    """One row per image: input, what the network sees, prediction. The masks depend on `seed` alone.

    Args:
        images: (N, C, H, W) normalised.
        num_visible: visible patches per image, None for as many as in training.
        channels, photographs: see `filled_grid`.

    Returns:
        (3, H', W') uint8 on the host.
    """
    positions = torch.arange(len(images), device=images.device)
    visible = model.sample_masks(seed, 0, positions, num_visible=num_visible)
    return filled_grid(model, images, visible, channels, photographs=photographs)


def filled_grid(
    model: Method, images: Tensor, visible: Tensor, channels: tuple[int, ...] = (), *, photographs: bool
) -> Tensor:
    """The same with masks of your choice: (N, L) int64, the visible patches of each image, ascending.

    Args:
        channels: shown as red, green and blue, or one as grey; (): the first three, of fewer the first as grey.
        photographs: shown as such. Of other images, which may use any part of their range, each channel is shown from
            the image's own 1st to its 99th percentile.
    """
    shown = list(channels or (range(3) if model.in_chans >= 3 else (0,)))
    with evaluation_mode(model):
        filled = model.reconstruct(images, visible)
    seen = VisiblePatches(visible, model.grid).cells(images.shape[2])
    pixels = _photographs if photographs else _stretched(images)
    image, prediction = (pixels(x)[:, shown].expand(-1, 3, -1, -1) for x in (images, filled))  # one channel is grey
    columns = [image, torch.where(seen, image, 0.5), prediction]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (N, 3 columns, 3, H, W) -> (N*3, 3, H, W)
    return (make_grid(rows, nrow=3, padding=PAD, pad_value=1.0) * 255).round().to(torch.uint8).cpu()


def titled(grid: Tensor, heading: str) -> Tensor:
    """A grid of `reconstruction_grid` with a heading, a title over each column, and a note on how to read it.

    Small pictures are enlarged by a whole number, so that there is room for the titles. (3, H, W) uint8, as is `grid`.
    """
    factor = math.ceil(COLUMN / ((grid.shape[2] - PAD) // len(TITLES) - PAD))
    pixels = grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    _, height, width = pixels.shape
    font, margin = ImageFont.load_default(FONT), PAD * factor
    column = (width - margin) // len(TITLES)
    above = _wrapped(heading, font, width - 2 * margin)
    titles = [_wrapped(title, font, column - margin) for title in TITLES]
    below = _wrapped(NOTE, font, width - 2 * margin)
    top = PAD + LINE * (len(above) + max(map(len, titles))) + PAD
    sheet = Image.new("RGB", (width, top + height + LINE * len(below) + PAD), "white")
    sheet.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (0, top))
    texts = [(above, margin, PAD, "la"), (below, margin, top + height, "la")]
    for i, lines in enumerate(titles):  # centred over its column, just above it
        texts.append((lines, margin + i * column + (column - margin) // 2, top - PAD - LINE * len(lines), "ma"))
    draw = ImageDraw.Draw(sheet)
    for lines, x, y, anchor in texts:
        for number, line in enumerate(lines):
            draw.text((x, y + number * LINE), line, "black", font, anchor)
    return torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, width, 3).permute(2, 0, 1)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            lines += [""] * (font.getlength(lines[-1] + letter) > width)
            lines[-1] += letter
    return lines


class BandFiles(NamedTuple):
    """How files of images that are no photographs are read, and normalised."""

    expected: Expected
    statistics: Statistics


def open_image(path: Path, size: tuple[int, int], bands: BandFiles | None = None) -> Tensor:
    """An image as the network sees it in evaluation: centrally cropped, resized, normalised, (C, *size).

    Args:
        bands: how it is read; None for a photograph.

    Raises:
        DataError: it cannot be read, by name.
    """
    try:
        data = path.read_bytes()
        if bands:
            image = as_batch(decode_bands(data, bands.expected).pixels, bands.statistics)
        else:
            image = decode_image(data).pixels
    except (OSError, ImageError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    box, host = centre_box(image.shape[0], image.shape[1], size), torch.device("cpu")
    if bands is None:
        return Normalise(size[1], host, torch.float32)(resized_crop(image, box, 0, size)[None])[0]
    normalise = BandNormalise(bands.statistics, size[1], host, torch.float32)
    return normalise(resized_bands(image, box, 0, size)[None])[0]


def save_png(grid: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8, whole or not at all. Raises OSError."""
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def check_picture_channels(channels: tuple[int, ...], in_chans: int) -> None:
    """Raise SettingsError for --picture_channels that images of so many channels cannot be shown by."""
    if channels and (len(channels) not in (1, 3) or not all(0 <= c < in_chans for c in channels)):
        raise SettingsError(
            f"--picture_channels must be one or three of the channels 0 to {in_chans - 1}, "
            f"got {' '.join(map(str, channels))}"
        )


def _stretched(images: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes pixels to [0, 1] from the 1st to the 99th percentile of each channel of these images (N, C, H, W)."""
    flat = images.float().flatten(2)  # (N, C, H*W)
    below = flat.shape[2] // 100  # pixels under the 1st percentile; torch.quantile takes no large images
    low, high = (flat.kthvalue(k, dim=2).values[..., None, None] for k in (1 + below, flat.shape[2] - below))
    return lambda x: ((x.float() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _photographs(images: Tensor) -> Tensor:
    """Undo the normalisation, to [0, 1]."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() * std + mean).clamp(0, 1)
