"""The names of SparK's tensors: published, ours, and the canonical ones under which files and models are compared.

    published                                 here
    sparse_encoder.sp_cnn.<network>           encoder.network.<network>
    dense_decoder.*                           decoder.*
    densify_norms.*, densify_projs.*, mask_tokens.*   the same

The network's own names are timm's for ResNets and the official ones for ConvNeXts. `timm.create_model(...,
features_only=True)` writes `stages_0` for timm's `stages.0`. So a canonical name is ours, of timm's network, with
underscores for dots.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from spark_fast.checkpoint.state_dict import strip_prefixes

ENCODER = "encoder_network_"  # canonical names of the encoder's tensors begin so
ENCODER_PREFIXES = ("encoder.network.", "sparse_encoder.sp_cnn.")
SPARK_PREFIXES = ("encoder.network.", "sparse_encoder.", "densify_", "mask_tokens")  # no plain network has these
IGNORED = {"imn_m", "imn_s", "norm_black", "config"}  # in published files: unused buffers, and the configuration

# official ConvNeXt -> timm
CONVNEXT = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
]
# a ConvNeXt of timm's `features_only` -> official
OFFICIAL = [
    (r"^stem_", "downsample_layers.0."),
    (r"^stages_(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages_(\d+)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
]


def spark_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model of `build_spark` as `load_spark_state_dict` reads it: published name -> tensor of any shape."""
    state = model.state_dict()
    convnext = any(name.startswith("encoder.network.stages_0.blocks.0.conv_dw.") for name in state)
    return {_publish(name, convnext): value.detach().cpu().contiguous() for name, value in state.items()}


def published_encoder(model: nn.Module) -> dict[str, Tensor]:
    """The encoder as the published code saves it alone: name (for ResNets timm's) -> tensor of any shape."""
    prefix = "sparse_encoder.sp_cnn."
    return {k.removeprefix(prefix): v for k, v in spark_state_dict(model).items() if k.startswith(prefix)}


def canonical_name(name: str) -> str:
    """The canonical name of a tensor of SparK, from its published name or ours, whatever wrapped the model."""
    name = strip_prefixes(name)
    for prefix in ENCODER_PREFIXES:
        if name.startswith(prefix):
            return ENCODER + network_name(name.removeprefix(prefix))
    return re.sub(r"^dense_decoder\.", "decoder.", name).replace(".", "_")


def network_name(name: str) -> str:
    """The canonical name of a tensor of a plain network: timm's for official ConvNeXts, underscores for dots."""
    for pattern, replacement in CONVNEXT:
        name = re.sub(pattern, replacement, name)
    return name.replace(".", "_")


def is_spark_name(name: str) -> bool:
    """Whether only SparK has a tensor of this name, and no plain network."""
    return strip_prefixes(name).startswith(SPARK_PREFIXES)


def _publish(name: str, convnext: bool) -> str:
    if not name.startswith("encoder.network."):
        return re.sub(r"^decoder\.", "dense_decoder.", name)
    inner = name.removeprefix("encoder.network.")
    for pattern, replacement in OFFICIAL if convnext else []:
        inner = re.sub(pattern, replacement, inner)
    return "sparse_encoder.sp_cnn." + inner
