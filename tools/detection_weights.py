"""Write a pre-trained ResNet or ConvNeXt as the backbone of a detector: torchvision, detectron2, mmdetection.

    python tools/detection_weights.py output_my_run --to detectron2 --out resnet50_d2.pth

The source is what spark-fast-export takes. docs/how_to/detection.md says how each program loads the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from spark_fast.errors import SettingsError, SparkFastError
from spark_fast.files import atomic_write
from spark_fast.weights.load_pretrained import load_pretrained
from spark_fast.weights.spark_keys import published_encoder

RESNETS = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]  # with the stem that the three programs build
CONVNEXTS = [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")]
NETWORKS = {"torchvision": RESNETS, "detectron2": RESNETS, "mmdetection": [*RESNETS, *CONVNEXTS]}


def detectron2_name(name: str) -> str:
    """The name in a detectron2 model with an FPN, as its tools/convert-torchvision-to-d2.py maps a ResNet's."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for stage in range(1, 5):
        name = name.replace(f"layer{stage}.", f"res{stage + 1}.")
    for number in range(1, 4):
        name = name.replace(f"bn{number}.", f"conv{number}.norm.")
    return "backbone.bottom_up." + name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def mmdetection_name(name: str) -> str:
    """The name in mmpretrain's ConvNeXt, which mmdetection uses; a ResNet's are torchvision's."""
    return name.replace(".dwconv.", ".depthwise_conv.").replace(".pwconv", ".pointwise_conv")


NAMES: dict[str, Callable[[str], str]] = {
    "torchvision": str,
    "detectron2": detectron2_name,
    "mmdetection": mmdetection_name,
}


def detection_weights(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CKPT")],
    *,
    to: Literal["torchvision", "detectron2", "mmdetection"],
    out: Path,
    model: str = "",
) -> int:
    """Write the backbone of a detector.

    Args:
        source: Run folder, or .pth or .safetensors file.
        to: The program that reads the file.
        out: File to write, .pth.
        model: The network, where the file does not tell (timm name).
    """
    if out.suffix != ".pth" or out.exists():
        raise SettingsError(f"{out} must end with .pth and must not exist yet")
    pretrained = load_pretrained(source, model)
    spec, network = pretrained.spec, pretrained.spec.network
    if network.partition(".")[0] not in NETWORKS[to]:
        raise SettingsError(f"this script has no backbone {network} for {to}, which gets {', '.join(NETWORKS[to])}")
    if spec.stages:
        raise SettingsError(
            f"only the first {spec.stages} stages of {network} were pre-trained, and a detector uses all"
        )
    if to == "torchvision" and spec.in_chans != 3:
        raise SettingsError(f"torchvision's detectors take images of 3 channels, {source} has {spec.in_chans}")
    encoder = published_encoder(pretrained.model)
    state = {NAMES[to](name): value for name, value in encoder.items() if not name.endswith("num_batches_tracked")}
    with atomic_write(out) as file:
        torch.save({"model": state} if to == "detectron2" else state, file)
    print(f"{out}: {len(state)} tensors of {network} for {to}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    try:
        return tyro.cli(detection_weights, args=argv, use_underscores=True, description=__doc__)
    except SparkFastError as error:
        print(f"detection_weights.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
