"""Export pre-trained weights for other programs, with a model card. The file is loaded and compared before it is kept.

    spark-fast-export output_my_run --to timm --out resnet50.safetensors

The source is a run folder (its newest checkpoint), a checkpoint, or a published file, with decoder or without.
Exit codes: 0 done, 2 settings, 6 storage or checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from spark_fast.cli.start import start
from spark_fast.cli.tool import run_tool
from spark_fast.networks import import_from_current_folder
from spark_fast.weights.export_formats import export
from spark_fast.weights.load_pretrained import load_pretrained


def export_weights(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CKPT")],
    *,
    to: Literal["timm", "torchvision", "safetensors", "hf_folder", "spark", "spark_encoder"],
    out: Path,
    model: str = "",
) -> int:
    """Export pre-trained weights for other programs.

    Args:
        source: Run folder, or .pth or .safetensors file.
        to: timm and hf_folder: timm's network without the classifier. torchvision: the whole network. safetensors: only
            the encoder's tensors. spark: encoder and decoder as saved by the published pre-training. spark_encoder:
            the encoder as read by the published fine-tuning (ConvNeXts in the official names).
        out: File to write (.safetensors or .pth), or folder for hf_folder.
        model: The network, if the file does not name it (timm name), or if it is your own (package.module:function).
    """
    import_from_current_folder(model)
    pretrained = load_pretrained(source, model)
    made = export(pretrained, to, out)
    print(f"{out}: {len(made.state)} tensors of {pretrained.spec.network} from {pretrained.path}, loaded and compared")
    if made.new:
        print(f"not pre-trained, at their initial values: {', '.join(made.new)}")
    print(made.usage.replace("PATH", str(out)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_tool("export", export_weights, argv)


if __name__ == "__main__":
    sys.exit(start("export"))
