"""Draw what a pre-trained model predicts: input, what the network sees, prediction, one row per image.

    spark-fast-reconstruct output_my_run photo.jpg other.png --out grid.png
    spark-fast-reconstruct output_my_run pictures --count 8 --out drawn
    spark-fast-reconstruct published.pth photo.jpg --out grid.png --seed 3
    spark-fast-reconstruct output_my_run photo.jpg --out grid.png --mask mask.txt

Exit codes: 0 done, 2 settings, 3 images, 6 storage or checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from spark_fast.cli.mask_file import read_mask
from spark_fast.cli.start import start
from spark_fast.cli.tool import run_tool
from spark_fast.errors import CheckpointError, DataError, SettingsError
from spark_fast.networks import import_from_current_folder
from spark_fast.pipelines.options import are_photographs
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS, IMAGE_EXTENSIONS, is_image
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.reporting.reconstructions import (
    PAD,
    TITLES,
    BandFiles,
    check_picture_channels,
    filled_grid,
    open_image,
    save_png,
    titled,
)
from spark_fast.weights.load_pretrained import Pretrained, load_pretrained

AT_ONCE = 16  # images that the network is given together
AS_TRAINED = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: as in training, or 0.6)")
MaskRatio = Annotated[float | None, AS_TRAINED]


def reconstruct(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CKPT")],
    images: Annotated[
        list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|FOLDER...", help_behavior_hint="(required)")
    ],
    *,
    out: Path,
    count: int = 32,
    overwrite: bool = False,
    mask_ratio: MaskRatio = None,
    seed: int = 0,
    mask: tuple[str, ...] = (),
    model: str = "",
    input_size: str = "",
    picture_channels: tuple[int, ...] = (),
    channels_first: bool = False,
    npz_key: str = "",
) -> int:
    """Draw what a pre-trained model predicts.

    Args:
        source: Run folder, or .pth or .safetensors file with a decoder (also a published one).
        images: Images like those of the run, or folders of them at any depth; cropped in the centre and resized.
        out: The picture to write, .png; or a folder, for one picture per image.
        count: Largest number of images to draw from a folder, evenly spread; 0: all.
        overwrite: Replace existing pictures.
        mask_ratio: Share of hidden patches; by default as in training (0.6 if the file does not say).
        seed: Decides the masks; each image has its own.
        mask: One mask for all images: rows of `.` (visible) and `#` (hidden), one character per patch; or a text file
            of such rows; or a picture that is bright where patches are visible.
        model: The network, if the file does not name it (timm name), or if it is your own (package.module:function).
        input_size: Pixels, N or HxW; by default as in training.
        picture_channels: Three channels to show as red, green and blue, or one as grey; by default the first three.
        channels_first: Arrays in .npy and .npz are (C, H, W), not (H, W, C).
        npz_key: Name of the array to read, for an .npz with several arrays.
    """
    one = out.suffix == ".png" and not out.is_dir()
    if out.suffix and not one and not out.is_dir():
        raise SettingsError(f"{out} must end with .png, or be a folder")
    if mask and mask_ratio is not None:
        raise SettingsError("--mask and --mask_ratio both set the hidden patches: choose one of them")
    if not images:
        raise SettingsError("give one image or more, or a folder")
    if count < 0:
        raise SettingsError(f"--count must be a number of images, or 0 for all, got {count}")
    import_from_current_folder(model)
    pretrained = _with_decoder(load_pretrained(source, model, input_size), picture_channels)
    bands = _bands(pretrained, channels_first, npz_key)
    paths = _paths(images, count, BAND_EXTENSIONS if bands else IMAGE_EXTENSIONS)
    pictures = _pictures(paths, out, one, overwrite)
    visible = _visible(pretrained, len(paths), mask, mask_ratio, seed)
    opened = _opened(paths, set(images), pretrained.spec.input_size, bands)
    rows = _rows(pretrained, opened, visible, picture_channels, photographs=bands is None)
    heading = _heading(pretrained)
    if one:
        _write_whole(rows, heading, out)
    else:
        _write_each({pictures[i]: titled(row, f"{paths[i].name}: {heading}") for i, row in rows.items()}, out)
    print(f"{out if one else f'{out}/'}: {_about(pretrained, len(rows))}")
    return 0


def _with_decoder(pretrained: Pretrained, channels: tuple[int, ...]) -> Pretrained:
    """The same, or why nothing can be reconstructed with it, or shown by these channels."""
    if not pretrained.weights.state.has_decoder:
        raise CheckpointError(
            f"{pretrained.path} has only an encoder, nothing can be reconstructed without the decoder: use the "
            f"run folder, its checkpoint, or the published file *_withdecoder_1kpretrained_spark_style.pth"
        )
    check_picture_channels(channels, pretrained.spec.in_chans)
    return pretrained


def _bands(pretrained: Pretrained, channels_first: bool, npz_key: str) -> BandFiles | None:
    """How images are read that are no photographs, as the run's were none; None: they are photographs."""
    known, in_chans = pretrained.weights.statistics, pretrained.spec.in_chans
    if are_photographs(in_chans, known.scale if known else "auto"):
        if channels_first or npz_key:
            raise SettingsError(f"{pretrained.path} is for photographs: --channels_first and --npz_key are for arrays")
        return None
    if known is None:
        raise SettingsError(
            f"{pretrained.path} is for images of in_chans {in_chans}, but has no mean and standard deviation to "
            f"normalise them: use the folder or a checkpoint of a run that read images from files"
        )
    return BandFiles(Expected(in_chans, channels_first=channels_first, npz_key=npz_key), known)


def _paths(images: list[Path], count: int, endings: tuple[str, ...]) -> list[Path]:
    """The images as given, and those of the folders; names with these endings."""
    return [path for given in images for path in (_of_folder(given, count, endings) if given.is_dir() else [given])]


def _of_folder(folder: Path, count: int, endings: tuple[str, ...]) -> list[Path]:
    """The images in a folder, at any depth, or `count` of them, evenly spread; says so if these are not all."""
    inside = (path for path in sorted(folder.rglob("*")) if is_image(path.name, endings) and path.is_file())
    found = [path for path in inside if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if not found:
        raise DataError(f"there are no images in {folder}")
    if not count or len(found) <= count:
        return found
    print(f"{count} of the {len(found)} images in {folder} are drawn (--count)")
    return [found[i * len(found) // count] for i in range(count)]


def _pictures(paths: list[Path], out: Path, one: bool, overwrite: bool) -> list[Path]:
    """What to write: `out`, or a picture in it of each image, by its stem, with a number where several have the same.

    Raises:
        SettingsError: one is there already, or is one of the images.
    """
    named: dict[str, Path] = {}  # in small letters, for file systems that do not tell them apart
    for path in [out] if one else paths:
        name, number = path.stem, 1
        while name.lower() in named:
            number += 1
            name = f"{path.stem}-{number}"
        named[name.lower()] = out if one else out / f"{name}.png"
    sources = {path.resolve() for path in paths}
    for picture in named.values():
        if picture.resolve() in sources:
            raise SettingsError(f"{picture} is one of the images: choose another --out")
        if picture.exists() and not overwrite:
            raise SettingsError(f"{picture} already exists: choose another --out, or --overwrite to replace it")
    return list(named.values())


def _opened(paths: list[Path], named: set[Path], size: tuple[int, int], bands: BandFiles | None) -> dict[int, Tensor]:
    """Number -> (C, *size); an image of a folder that cannot be read is left out, one given by its name ends it."""
    opened = {}
    for number, path in enumerate(paths):
        try:
            opened[number] = open_image(path, size, bands)
        except DataError as error:  # noqa: PERF203
            if path in named:
                raise
            print(f"left out: {error}")
    if not opened:
        raise DataError("none of the images can be read")
    return opened


def _visible(pretrained: Pretrained, count: int, mask: tuple[str, ...], ratio: float | None, seed: int) -> Tensor:
    """(count, L) int64: the visible patches of each image."""
    model = pretrained.model
    try:
        if mask:
            return read_mask(mask, model.grid).flatten().nonzero().flatten().repeat(count, 1)
        num_visible = model.num_visible if ratio is None else model.visible_at(ratio)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return model.sample_masks(seed, 0, torch.arange(count), num_visible=num_visible)


def _rows(
    pretrained: Pretrained,
    opened: dict[int, Tensor],
    visible: Tensor,
    channels: tuple[int, ...],
    *,
    photographs: bool,
) -> dict[int, Tensor]:
    """Number -> its row of pictures, (3, PAD + H + PAD, W) uint8."""
    rows: dict[int, Tensor] = {}
    numbers, height = list(opened), PAD + pretrained.spec.input_size[0]
    for first in range(0, len(numbers), AT_ONCE):
        chosen = numbers[first : first + AT_ONCE]
        images = torch.stack([opened[i] for i in chosen])
        grid = filled_grid(pretrained.model, images, visible[chosen], channels, photographs=photographs)
        rows |= {i: grid[:, at * height : (at + 1) * height + PAD] for at, i in enumerate(chosen)}
    return rows


def _write_whole(rows: dict[int, Tensor], heading: str, path: Path) -> None:
    whole = [row[:, PAD * (at > 0) :] for at, row in enumerate(rows.values())]  # two rows share a margin
    save_png(titled(torch.cat(whole, 1), heading), path)


def _write_each(pictures: dict[Path, Tensor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path, picture in pictures.items():
        save_png(picture, path)


def _heading(pretrained: Pretrained) -> str:
    record = pretrained.weights.record
    known = f"step {record.step}, loss {record.loss:.4f}" if record else pretrained.path.name
    return f"{pretrained.spec.network}, {known}"


def _about(pretrained: Pretrained, drawn: int) -> str:
    (h, w), patch = pretrained.model.grid, pretrained.model.patch
    what = f"{drawn} image{'s' * (drawn != 1)}, {', '.join(TITLES)}"
    return f"{what}, by {pretrained.spec.network} on {h}x{w} patches of {patch} px"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_tool("reconstruct", reconstruct, argv)


if __name__ == "__main__":
    sys.exit(start("reconstruct"))
