"""What a SparK model is, as far as its weights go: told by a checkpoint's settings, or by a published file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spark_fast.networks import PUBLISHED_MODELS, parse_input_size
from spark_fast.spark import SparK, build_spark
from spark_fast.weights.read import Weights

UNUSED_WIDTH = 128  # of the decoder that a model gets where the file has none

# A setting of these groups that is not known here may change what the model is, so its checkpoint is refused. What is
# in the other groups says how the model was trained.
KNOWN = {
    "data": {
        *("data_path", "pipeline", "ffcv_resize", "decode", "augment", "input_size", "batch_size", "workers"),
        *("prefetch", "max_bad_fraction", "max_pixels"),
    },
    "model": {
        *("model", "stages", "mask_ratio", "drop_path", "decoder_width", "encoder", "verify", "sparse_conv"),
        "init_weight",
    },
}


@dataclass(frozen=True)
class ModelSpec:
    """A SparK model without its weights.

    Attributes:
        network: timm name, or `package.module:function`.
        input_size: (H, W) in pixels.
        mask_ratio: share of the patches hidden.
        decoder_width: channels of the decoder at the coarsest level.
        stages: levels of the pyramid, from stride 4 upwards; 0: all.
        encoder: by which of the encoders it computes; the weights are the same for all.
    """

    network: str = "resnet50"
    input_size: tuple[int, int] = (224, 224)
    mask_ratio: float = 0.6
    decoder_width: int = 768
    stages: int = 0
    encoder: str = "packed"

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> ModelSpec:
        """The model of a checkpoint's settings; what an older version did not write is the default.

        Raises:
            ValueError: a setting that this version does not know, or a value that makes no sense.
            TypeError: a value of another type.
        """
        data, model = _group(settings, "data"), _group(settings, "model")
        name = str(model.get("model", cls.network))
        return cls(
            PUBLISHED_MODELS.get(name, name),
            parse_input_size(str(data.get("input_size", 224))),
            float(model.get("mask_ratio", cls.mask_ratio)),
            int(model.get("decoder_width", cls.decoder_width)),
            int(model.get("stages", cls.stages)),
        )

    @classmethod
    def from_weights(cls, weights: Weights, network: str) -> ModelSpec:
        """The model of a file without settings: its tensors tell the decoder's width, its "config" the ratio."""
        first = weights.state.tensors.get("decoder_dec_0_up_sample_weight")  # (width, width, 4, 4)
        width = UNUSED_WIDTH if first is None else len(first)
        return cls(
            network,
            weights.input_size or cls.input_size,
            weights.mask_ratio or cls.mask_ratio,
            decoder_width=width,
        )

    def build(self) -> SparK:
        """The model, on the host, as it is initialised. Raises ValueError as `build_spark`."""
        return build_spark(
            self.network,
            input_size=self.input_size,
            mask_ratio=self.mask_ratio,
            decoder_width=self.decoder_width,
            encoder=self.encoder,
            stages=self.stages or None,
            check=False,  # it was, before the training
        )


def _group(settings: Mapping[str, object], name: str) -> Mapping:
    group = settings.get(name, {})
    if not isinstance(group, Mapping):
        raise TypeError(f"{name} is {group!r}")
    if unknown := sorted(map(str, set(group) - KNOWN[name])):
        raise ValueError(f"{name} has an unknown setting: {', '.join(unknown)}")
    return group
