"""Draw how far visible pixels reach under a mask, layer by layer: dense convolutions beside the packed encoder.

    python docs/generate/draw_mask_pattern.py         # the picture and the table of docs/explanation/why_sparse.md

Both rows are computed by the real network, with its weights replaced: every filter averages what it sees, norms do
nothing, so that a cell is positive exactly where a visible pixel lies in its receptive field. Needs matplotlib.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from spark_fast.encoder import PackedEncoder, VisiblePatches
from spark_fast.files import atomic_write
from spark_fast.masking import num_visible, sample_visible
from spark_fast.networks import build_network

PICTURE = Path(__file__).parents[1] / "pictures" / "mask_pattern.png"


@dataclass
class Options:
    """What to draw."""

    model: str = "resnet50"
    """timm name; one whose layers are convolutions, norms, activations and poolings"""
    layers: tuple[str, ...] = ("conv1", "maxpool", "layer1.0", "layer1.2", "layer2.3", "layer3.5", "layer4.2")
    """modules of the network whose output is shown"""
    input_size: int = 224
    mask_ratio: float = 0.6
    seed: int = 0
    out: Path = PICTURE


def averaging(model: str) -> nn.Module:
    """A network of timm that averages: every filter constant with sum 1, no bias, norms and scales 1. In float64.

    Nothing can cancel, so zeros are cells that no visible pixel reaches.
    """
    network = build_network(model).double().eval()
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if "Norm" in type(module).__name__ and all(p.dim() == 1 for p in module.parameters()):
                setattr(parent, name, nn.Identity())
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1 / weight[0].numel() if weight.dim() > 1 else 1.0)
    return network


def patterns(options: Options) -> dict[str, tuple[Tensor, Tensor]]:
    """layer -> (dense, packed), bool (H_i, W_i) each: which cells a visible pixel has reached; "input" first.

    Raises:
        ValueError: the network is unknown, cannot be packed or has no such layer, or size and ratio do not fit.
    """
    network = averaging(options.model)
    unknown = [name for name in options.layers if name not in dict(network.named_modules())]
    if unknown:
        raise ValueError(f"{options.model} has no layer {', '.join(unknown)}")
    size = (options.input_size, options.input_size)
    packed = PackedEncoder(copy.deepcopy(network), size)
    grid = (size[0] // packed.patch, size[1] // packed.patch)
    keep = num_visible(grid, options.mask_ratio)
    seen = VisiblePatches(sample_visible(options.seed, 0, torch.zeros(1, dtype=torch.int64), grid, keep), grid)
    images = seen.cells(size[0]).double().expand(1, 3, *size)  # 1 where visible, 0 where hidden
    dense_maps = outputs(network, options.layers, lambda: network(images))
    packed_maps = outputs(packed.network, options.layers, lambda: packed(images, seen))
    found = {"input": (reached(images), reached(images))}
    for name in options.layers:
        found[name] = reached(dense_maps[name]), reached(seen.unpack(packed_maps[name]))
    return found


def outputs(network: nn.Module, layers: tuple[str, ...], run: Callable[[], object]) -> dict[str, Tensor]:
    """What each of these layers puts out while `run` runs."""
    found: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: found.__setitem__(name, out))
        for name in layers
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def reached(maps: Tensor) -> Tensor:
    """(1, C, H, W) -> bool (H, W)."""
    return (maps[0] > 0).any(0)


def table(found: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Markdown: the share of cells that a visible pixel has reached."""
    lines = ["| layer | cells | dense convolution | packed |", "| --- | --- | --- | --- |"]
    for name, (dense, packed) in found.items():
        h, w = dense.shape
        lines.append(f"| {name} | {h} x {w} | {dense.float().mean():.1%} | {packed.float().mean():.1%} |")
    return "\n".join(lines)


def draw(found: dict[str, tuple[Tensor, Tensor]]) -> bytes:
    """A PNG: a column for each layer, dense above packed; visible cells dark."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(1.5 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (name, rows) in enumerate(found.items()):
        for row, (pattern, way) in enumerate(zip(rows, ("dense", "packed"), strict=True)):
            panel = axes[row, column]
            panel.imshow(~pattern.numpy(), cmap="gray", vmin=0, vmax=1.25, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"{pattern.float().mean():.0%}", fontsize=9)
            panel.set_title(name if row == 0 else "", fontsize=9)
            panel.set_ylabel(way if column == 0 else "", fontsize=10)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=90, metadata={"Software": None})
    return content.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(Options, args=argv, use_underscores=True, prog="draw_mask_pattern.py", description=__doc__)
    try:
        found = patterns(options)
        picture = draw(found)
        with atomic_write(options.out) as file:
            file.write(picture)
    except (ValueError, OSError) as error:
        print(f"draw_mask_pattern: {error}", file=sys.stderr)
        return 6 if isinstance(error, OSError) else 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
