"""What a SparK model is, as far as its weights go: told by a checkpoint's settings, or by a published file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spark_fast.method import METHODS, Method, build, method_class
from spark_fast.networks import PUBLISHED_MODELS, parse_input_size
from spark_fast.pipelines.transforms.resize import MEAN, STD
from spark_fast.weights.read import Weights

UNUSED_WIDTH = 128  # of the decoder that a model gets where the file has none

# A setting of these groups that is not known here may change what the model is, so its checkpoint is refused. What is
# in the other groups says how the model was trained.
KNOWN = {
    "data": {
        *("data_path", "val_path", "pipeline", "ffcv_resize", "decode", "augment", "input_size", "in_chans"),
        *("batch_size", "workers", "worker_processes", "prefetch", "max_bad_fraction", "max_pixels", "min_crop"),
        *("crop_scale", "hflip", "vflip", "rot90", "scale", "mean", "std", "channels_first", "npz_key"),
        *("shuffle_block", "cache_dir", "cache_size"),
    },
    "model": {
        *("model", "stages", "mask_ratio", "drop_path", "decoder_width", "encoder", "verify", "sparse_conv"),
        *("init_weight", "method", "masks_per_image", "decoder_depth"),
    },
}


@dataclass(frozen=True)
class ModelSpec:
    """A method's model without its weights.

    Attributes:
        network: timm name, or `package.module:function`.
        input_size: (H, W) in pixels.
        mask_ratio: share of the patches hidden.
        decoder_width: channels of the decoder at the coarsest level.
        stages: levels of the pyramid, from stride 4 upwards; 0: all.
        encoder: by which of the encoders it computes; the weights are the same for all.
        method: its name, see `spark_fast.method`.
        decoder_depth: blocks of the decoder, where the method lets it be chosen.
        in_chans: channels of the images.
        mean, std: by which they are normalised, a number a channel; () for ImageNet's, or where they are not known.
    """

    network: str = "resnet50"
    input_size: tuple[int, int] = (224, 224)
    mask_ratio: float = 0.6
    decoder_width: int = 768
    stages: int = 0
    encoder: str = "packed"
    method: str = "spark"
    decoder_depth: int = 1
    in_chans: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> ModelSpec:
        """The model of a checkpoint's settings; what an older version did not write is the default.

        Raises:
            ValueError: a setting that this version does not know, or a value that makes no sense.
            TypeError: a value of another type.
        """
        data, model = _group(settings, "data"), _group(settings, "model")
        name = str(model.get("model", cls.network))
        method = str(model.get("method", cls.method))
        if method not in METHODS:  # code is imported because you say so, never because a file does
            raise ValueError(f"it was trained by your own method, {method}: use the encoder's file in the run folder")
        return cls(
            PUBLISHED_MODELS.get(name, name),
            parse_input_size(str(data.get("input_size", 224))),
            float(model.get("mask_ratio", cls.mask_ratio)),
            int(model.get("decoder_width", cls.decoder_width)),
            int(model.get("stages", cls.stages)),
            method=method,
            decoder_depth=int(model.get("decoder_depth", cls.decoder_depth)),
            in_chans=int(data.get("in_chans", cls.in_chans)),
        )

    @classmethod
    def from_weights(cls, weights: Weights, network: str) -> ModelSpec:
        """The model of a file without settings: its tensors tell the decoder and its levels, its "config" the ratio."""
        token = weights.state.tensors.get("mask_token")  # (1, width, 1, 1)
        if token is not None:
            depth = sum(name.endswith("conv_dw_weight") for name in weights.state.tensors if name.startswith("decoder"))
            size = weights.input_size or cls.input_size
            return cls(
                network,
                size,
                decoder_width=token.numel(),
                method="fcmae",
                stages=weights.stages(network),
                decoder_depth=depth,
                in_chans=weights.in_chans(network),
            )
        first = weights.state.tensors.get("decoder_dec_0_up_sample_weight")  # (width, width, 4, 4)
        width = UNUSED_WIDTH if first is None else len(first)
        return cls(
            network,
            weights.input_size or cls.input_size,
            weights.mask_ratio or cls.mask_ratio,
            decoder_width=width,
            stages=weights.stages(network),
            in_chans=weights.in_chans(network),
        )

    @property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """By which images are normalised, a number a channel each; (), () where it is not known."""
        return (MEAN, STD) if self.in_chans == 3 and not self.mean else (self.mean, self.std)

    def build(self) -> Method:
        """The model, on the host, as it is initialised. Raises ValueError as `spark_fast.method.build`."""
        kind = method_class(self.method)
        return build(
            kind,
            self.network,
            input_size=self.input_size,
            mask_ratio=self.mask_ratio,
            encoder=self.encoder,
            stages=self.stages or None,
            in_chans=self.in_chans,
            check=False,  # it was, before the training
            **{name: getattr(self, name) for name in kind.options},
        )


def _group(settings: Mapping[str, object], name: str) -> Mapping:
    group = settings.get(name, {})
    if not isinstance(group, Mapping):
        raise TypeError(f"{name} is {group!r}")
    if unknown := sorted(map(str, set(group) - KNOWN[name])):
        raise ValueError(f"{name} has an unknown setting: {', '.join(unknown)}")
    return group
