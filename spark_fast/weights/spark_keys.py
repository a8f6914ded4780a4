"""Checkpoints in the published SparK naming, in and out.

    published                                 here
    sparse_encoder.sp_cnn.<network>           encoder.network.<network>
    dense_decoder.*                           decoder.*
    densify_norms.*, densify_projs.*, mask_tokens.*   the same

The network's own names are timm's for ResNets and the official ones for ConvNeXts; `timm.create_model(...,
features_only=True)` writes `stages_0` for timm's `stages.0`, so names are compared with dots and underscores alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from spark_fast.checkpoint.state_dict import load_strictly, strip_prefixes, tensors_of

DEPRECATED = {"imn_m", "imn_s", "norm_black"}  # buffers of the published module that were never used

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
    """The tensors of a model from `build_spark` under their published names: what `load_spark_state_dict` reads."""
    state = model.state_dict()
    convnext = any(name.startswith("encoder.network.stages_0.blocks.0.conv_dw.") for name in state)
    return {_publish(name, convnext): value.detach().cpu().contiguous() for name, value in state.items()}


def load_spark_state_dict(model: nn.Module, state: Mapping) -> None:
    """Load a checkpoint of the published code into a model from `build_spark`.

    Args:
        state: the state dict itself, or the whole checkpoint (see `tensors_of`); ResNets in timm's names, ConvNeXts
            in the official ones. The three deprecated buffers and "config" are ignored.

    Raises:
        ValueError: tensors missing, unknown, or of another shape, by name. The model is then unchanged.
    """
    state = tensors_of(state)
    own = {_plain(name): name for name in model.state_dict()}
    found: dict[str, Tensor] = {}
    unknown = []
    for published, value in state.items():
        name = strip_prefixes(str(published))
        if name in DEPRECATED or name == "config":
            continue
        target = own.get(_plain(_translate(name)))
        if target is None:
            unknown.append(str(published))
        else:
            found[target] = value
    load_strictly(model, found, unknown)


def encoder_name(name: str) -> str:
    """The name of an encoder's tensor without prefix, dots as underscores, ConvNeXts as timm has them."""
    inner = name.removeprefix("encoder.network.")
    return _plain(_translate("sparse_encoder.sp_cnn." + inner).removeprefix("encoder.network."))


def _publish(name: str, convnext: bool) -> str:
    if not name.startswith("encoder.network."):
        return re.sub(r"^decoder\.", "dense_decoder.", name)
    inner = name.removeprefix("encoder.network.")
    for pattern, replacement in OFFICIAL if convnext else []:
        inner = re.sub(pattern, replacement, inner)
    return "sparse_encoder.sp_cnn." + inner


def _translate(name: str) -> str:
    if name.startswith("sparse_encoder.sp_cnn."):
        inner = name.removeprefix("sparse_encoder.sp_cnn.")
        for pattern, replacement in CONVNEXT:
            inner = re.sub(pattern, replacement, inner)
        return "encoder.network." + inner
    return re.sub(r"^dense_decoder\.", "decoder.", name)


def _plain(name: str) -> str:
    return name.replace(".", "_")
