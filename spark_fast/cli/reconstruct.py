"""Draw what a pre-trained model makes of images: input, visible part, reconstruction, a row per image.

    spark-fast-reconstruct output_my_run photo.jpg other.png --out grid.png
    spark-fast-reconstruct res50_withdecoder_1kpretrained_spark_style.pth photo.jpg --out grid.png --seed 3
    spark-fast-reconstruct output_my_run photo.jpg --out grid.png --mask mask.txt

Exit codes: 0 done, 2 settings, 3 images, 6 storage or checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from spark_fast.cli.start import start
from spark_fast.cli.tool import run_tool
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.mask_file import read_mask
from spark_fast.masking import num_visible
from spark_fast.networks import import_from_current_folder
from spark_fast.reporting.reconstructions import filled_grid, open_images, reconstruction_grid, save_png
from spark_fast.weights.load_pretrained import Pretrained, load_pretrained


def reconstruct(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CKPT")],
    images: Annotated[list[Path], tyro.conf.Positional],
    *,
    out: Path,
    mask_ratio: float | None = None,
    seed: int = 0,
    mask: tuple[str, ...] = (),
    model: str = "",
    input_size: str = "",
) -> int:
    """Draw what a pre-trained model makes of images.

    Args:
        source: Run folder, or .pth or .safetensors file with a decoder (also a published one).
        images: Cropped in the centre to the input's shape, and resized.
        out: The picture to write, .png.
        mask_ratio: Share of patches hidden; by default that of the training (0.6 where the file does not say).
        seed: Of the masks; each image has its own.
        mask: One mask for all images: rows of `.` (visible) and `#` (hidden), a character per patch; or a text file of
            such rows; or a picture, bright where visible.
        model: The network, where the file does not tell (timm name), or if it is your own (package.module:function).
        input_size: Pixels, N or HxW; by default as in training.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    if mask and mask_ratio is not None:
        raise SettingsError("--mask says which patches are hidden, --mask_ratio how many: choose one of them")
    if not images:
        raise SettingsError("give one image or more")
    import_from_current_folder(model)
    pretrained = load_pretrained(source, model, input_size)
    if not pretrained.weights.state.has_decoder:
        raise CheckpointError(
            f"{pretrained.path} holds an encoder alone, nothing can be reconstructed without the decoder: give the "
            f"run folder, its checkpoint, or the published file *_withdecoder_1kpretrained_spark_style.pth"
        )
    pixels = open_images(images, pretrained.spec.input_size)
    grid = pretrained.model.grid
    try:
        if mask:
            visible = read_mask(mask, grid).flatten().nonzero().flatten().repeat(len(images), 1)  # (N, L)
            picture = filled_grid(pretrained.model, pixels, visible)
        else:
            keep = None if mask_ratio is None else num_visible(grid, mask_ratio)
            picture = reconstruction_grid(pretrained.model, pixels, seed, keep)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    save_png(picture, out)
    print(f"{out}: {len(images)} images, {_about(pretrained)}")
    return 0


def _about(pretrained: Pretrained) -> str:
    (h, w), network = pretrained.model.grid, pretrained.spec.network
    return f"input, visible part, reconstruction, by {network} on {h}x{w} patches of {pretrained.model.patch} px"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_tool("reconstruct", reconstruct, argv)


if __name__ == "__main__":
    sys.exit(start("reconstruct"))
