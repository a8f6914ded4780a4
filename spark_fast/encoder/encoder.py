"""A ConvNet as an encoder of visible patches: one mathematics, computed packed or masked."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import MASKED, PACKED, LayerTable, check_layers, convert_layers
from spark_fast.encoder.layer_registry import UnsupportedLayerError
from spark_fast.encoder.layers.converted import ConvertedLayer
from spark_fast.encoder.layers.halo import HaloLayer
from spark_fast.encoder.pyramid import Running, as_size, feature_maps, find_pyramid, meta_images, run_on_meta
from spark_fast.encoder.visible import VisiblePatches


class Encoder(nn.Module):
    """A ConvNet as an encoder of visible patches.

    Args:
        network: returns a list of feature maps of falling resolution; it is converted in place.
        input_size: (H, W) in pixels.
        stages: keep the first so many levels of the pyramid (maps finer than stride 4 are never used), all by
            default. The last one kept sets the patch, so the network must not go on beyond it.
        visible_ratio: the visible share of the patches, for the printed algorithms.
        in_chans: channels of the images, as many as the network's first layer takes.

    Attributes:
        channels, strides: of the levels kept, finest first.
        restore_layers: puts the network's own layers back; a copy has none.

    Raises:
        UnsupportedLayerError: a layer that cannot be packed, by name.
        ValueError: levels that are not a pyramid of factors of two, or an input size off the patch grid.
    """

    table: LayerTable

    def __init__(
        self,
        network: nn.Module,
        input_size: tuple[int, int],
        stages: int | None = None,
        visible_ratio: float = 0.4,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_layers(network)
        self.in_chans = in_chans
        self.context = EncoderContext(dense=self.table is MASKED)
        self.levels, self.channels, self.strides = find_pyramid(network, input_size, stages, in_chans)
        self.network, self.restore_layers = convert_layers(network, self.table, self.context)
        try:
            self._trace(input_size, visible_ratio)
        except Exception:
            self.restore_layers()
            raise

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "restore_layers"}

    @property
    def patch(self) -> int:
        """Pixels per patch side: the total stride."""
        return self.strides[-1]

    def forward(self, images: Tensor, visible: VisiblePatches | None = None) -> list[Tensor]:
        """Encode the visible patches of a batch, or whole images.

        Args:
            images: (B, C, H, W).
            visible: the patches to encode, of K masks of each image next to one another; None: the whole images.

        Returns:
            per level, finest first: the packed features (V, C_i, b_i, b_i) of the visible patches; without
            `visible` the dense maps (B, C_i, H_i, W_i) of the ordinary network.
        """
        self.context.begin(visible)
        try:
            features = feature_maps(self.network, images if visible is None else self._enter(images, visible))
            features = [features[i] for i in self.levels]
            if visible is None:
                return features
            self.context.recall_for(features)
            return self._leave(features, visible)
        finally:
            self.context.forget()

    def _enter(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        """Images -> what the converted network runs on."""
        raise NotImplementedError

    def _leave(self, features: list[Tensor], visible: VisiblePatches) -> list[Tensor]:
        """What the converted network returns -> (V, C_i, b_i, b_i) per level."""
        raise NotImplementedError

    def _trace(self, input_size: tuple[int, int], visible_ratio: float) -> None:
        """Run once on the meta device: every layer learns its b, and one that does not fit is refused by name."""
        grid = (input_size[0] // self.patch, input_size[1] // self.patch)

        def note(module: nn.Module, inputs: tuple) -> None:
            if isinstance(module, HaloLayer) and inputs[0].dim() == 4:
                module.cells, module.visible_ratio = inputs[0].shape[2], visible_ratio

        hooks = ExitStack()
        running = hooks.enter_context(Running(self.network))
        for module in self.network.modules():
            hooks.enter_context(module.register_forward_pre_hook(note))
        try:
            index = torch.arange(max(1, round(visible_ratio * grid[0] * grid[1])), device="meta").repeat(2, 1)
            maps = run_on_meta(
                self, meta_images(self.network, 2, input_size, self.in_chans), VisiblePatches(index, grid)
            )
            for features, stride in zip(maps, self.strides, strict=True):
                if features.shape[2] != self.patch // stride:
                    raise ValueError(
                        f"a level comes out with {features.shape[2]} cells per patch side at stride {stride}"
                    )
        except Exception as error:
            path, module = running.stack[-1][:2] if running.stack else ("", self.network)
            own = isinstance(module, ConvertedLayer) or not module._modules
            patch = f"(V, {self.in_chans}, {self.patch}, {self.patch})"
            why = "" if own else f", in its own forward, which is given patches {patch} in place of images"
            place = f"{path or 'network'} ({_own_type(module)})"
            raise UnsupportedLayerError(f"cannot be packed: {place}: {error}{why}") from error
        finally:
            hooks.close()


class PackedEncoder(Encoder):
    """Computes on the visible patches alone, each a small image; layers exchange halos across patch edges."""

    table = PACKED

    def _enter(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        return visible.pack(images)  # (V, C, patch, patch)

    def _leave(self, features: list[Tensor], visible: VisiblePatches) -> list[Tensor]:
        return features


class MaskedEncoder(Encoder):
    """Computes on the whole image with the holes zeroed, as the published code does."""

    table = MASKED

    def _enter(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        eager = not torch.compiler.is_compiling()
        if eager and self.training and any(type(m) is nn.SyncBatchNorm for m in self.network.modules()):
            raise RuntimeError(
                "nn.SyncBatchNorm.convert_sync_batchnorm has replaced the norms that leave the holes out: "
                "build with sync_batchnorm=True instead"
            )
        return visible.repeat_images(images).masked_fill(~visible.cells(images.shape[2]), 0.0)  # (B*K, C, H, W)

    def _leave(self, features: list[Tensor], visible: VisiblePatches) -> list[Tensor]:
        return [visible.pack(f) for f in features]


def pack(
    network: nn.Module, input_size: int | tuple[int, int] = 224, stages: int | None = None, in_chans: int = 3
) -> PackedEncoder:
    """Convert a network that returns a list of feature maps into a packed encoder, in place.

    Printed, the encoder shows how each layer that looks across patches is computed, with 40 % of them visible.

    Args:
        network: returns a list of feature maps of falling resolution.
        input_size: pixels, one number or (H, W); a multiple of the network's total stride.
        stages: keep the first so many levels of the pyramid, all by default.
        in_chans: channels of the images.

    Raises:
        UnsupportedLayerError: a layer that cannot be packed, by name.
        ValueError: levels that are not a pyramid of factors of two, or an input size off the patch grid.
    """
    return PackedEncoder(network, as_size(input_size), stages, in_chans=in_chans)


def _own_type(module: nn.Module) -> str:
    """The name of the layer's class before it was converted."""
    return (module.original_type() if isinstance(module, ConvertedLayer) else type(module)).__name__
