"""The bases of the mixins of converted layers.

`spark_fast.encoder.convert_network` gives a layer a new class with two bases, the mixin and the layer's own class. The
layer keeps its parameters, and `super().forward` in a mixin is the forward of the original layer.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from spark_fast.encoder.context import EncoderContext


class ConvertedLayer(nn.Module):
    """Base of the mixins.

    Attributes:
        context: the visible patches of the running call.
        layer_path: where the layer is in its network, for messages.
    """

    context: EncoderContext
    layer_path: str

    @classmethod
    def original_type(cls) -> type[nn.Module]:
        """The class of the layer before it was converted."""
        return cls.__bases__[1]

    def __reduce__(self) -> tuple:
        """For pickle and `copy`: the class is found in no module."""
        return new_layer, type(self).__bases__, self.__dict__


def new_layer(mixin: type[ConvertedLayer], base: type[nn.Module]) -> ConvertedLayer:
    """An empty layer with these two bases; its attributes are set by the caller."""
    cls = _converted_class(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


@cache
def _converted_class(mixin: type[ConvertedLayer], base: type[nn.Module]) -> type[ConvertedLayer]:
    """Made on demand, as torch.nn.utils.parametrize does, so that each kind is written once for all types."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


class PaddedLayer(ConvertedLayer):
    """A convolution or pooling, which may take over the padding of a layer before it.

    Attributes:
        folded_padding: that padding in cells: left, right, top, bottom.
        fill: the value of padded cells.
    """

    folded_padding = (0, 0, 0, 0)
    fill = 0.0


class FoldedPadding(ConvertedLayer):
    """Mixin: a padding layer whose padding the layer after it has taken over."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b), returned as it is: a patch has no border to pad. A dense map (B, C, H, W) is padded."""
        return super().forward(x) if self.context.visible is None else x
