"""The tensors of a checkpoint of the published FCMAE trainer, in the dense layout and under our names.

The published encoder computes with MinkowskiEngine, which keeps kernels as (taps, in, out), a depthwise one as
(taps, C), taps numbered column by column, and vectors as (1, C). Its norms and linear layers are wrapped, as `.ln.` and
`.linear.`.

    published                            here
    encoder.<official ConvNeXt V2>       encoder.network.<timm>
    decoder.i.dwconv, .norm, .pwconvj, .grn     decoder.i.conv_dw, .norm, .mlp.fcj, .mlp.grn
    proj.*, pred.*, mask_token           the same
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from spark_fast.weights.spark_keys import ENCODER, network_name

DECODER = re.compile(r"^decoder\.(\d+)\.(dwconv|norm|pwconv\d|grn)\.")
ENCODER_LAYER = re.compile(r"^encoder\.(downsample_layers|stages)\.")


def is_published_fcmae(names: Mapping[str, object]) -> bool:
    """Whether a state dict is one of the published FCMAE trainer: it has an encoder in the official names."""
    return "mask_token" in names and any(map(ENCODER_LAYER.match, names))


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under canonical names (`spark_keys`), in the layouts of dense layers.

    Kernels become (out, in, k, k), vectors (C,), other tensors of any shape stay as they are.

    Raises:
        ValueError: the taps of a kernel are no square; the message names it.
    """
    found = {}
    for name, value in state.items():
        plain = name.replace(".ln.", ".").replace(".linear.", ".")
        if plain.endswith(".kernel"):
            plain, value = plain.removesuffix("kernel") + "weight", _dense_kernel(name, value)
        elif ".grn." in plain or (plain.endswith(".bias") and value.dim() == 2):
            value = value.flatten()
        found[canonical_fcmae_name(plain)] = value
    return found


def canonical_fcmae_name(name: str) -> str:
    """The canonical name of a tensor of FCMAE, from our name for it, or from the published one of a dense layer."""
    if ENCODER_LAYER.match(name):
        return ENCODER + network_name(name.removeprefix("encoder."))
    if DECODER.match(name):
        return "decoder_" + network_name(name.removeprefix("decoder."))
    return name.replace(".", "_")


def _dense_kernel(name: str, kernel: Tensor) -> Tensor:
    """(taps, in, out) -> (out, in, k, k), or depthwise (taps, C) -> (C, 1, k, k); tap = column * k + row."""
    taps = len(kernel)
    side = round(taps**0.5)
    if side * side != taps:
        raise ValueError(f"{name} has {taps} taps, which is not a square kernel")
    kernel = kernel[:, None] if kernel.dim() == 2 else kernel  # depthwise: one input channel each
    return kernel.permute(2, 1, 0).reshape(kernel.shape[2], kernel.shape[1], side, side).transpose(2, 3)
