"""The pyramid of feature maps that a network returns: its levels, found without computing anything.

A network that returns none is refused: the message begins with what is wrong, and ends with what to do.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spark_fast.evaluation_mode import evaluation_mode

MIN_STRIDE = 4  # SparK decodes from stride 4 upwards; finer maps are dropped


class NetworkFormError(ValueError):
    """The network takes or returns something else than is needed, at any input size."""


class Pyramid(NamedTuple):
    """The levels kept, finest first."""

    levels: list[int]  # which of the network's maps
    channels: list[int]
    strides: list[int]

    @property
    def patch(self) -> int:
        """Pixels per patch side: the total stride."""
        return self.strides[-1]


def as_size(input_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an input size that may be one number. Raises ValueError if it is neither."""
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"input_size must be a number of pixels or (H, W), got {input_size!r}")
    return size[0], size[1]


def feature_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The network's maps, (B, C_i, H_i, W_i) each; those of timm's channels-last networks are turned round."""
    return _channels_first(network, network(images))


def _channels_first(network: nn.Module, maps: object) -> list[Tensor]:
    if not isinstance(maps, (list, tuple)) or not maps or not all(isinstance(m, Tensor) and m.dim() == 4 for m in maps):
        raise NetworkFormError(f"the network must return a list of feature maps (B, C, H, W), got {_described(maps)}")
    last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return [m.permute(0, 3, 1, 2) if last else m for m in maps]


def _described(output: object) -> str:
    """What a network returned in place of a list of maps, and what to return."""
    name = type(output).__name__
    if isinstance(output, Tensor):
        return (
            f"{name} of shape {tuple(output.shape)}, a single one. Return the map of every stage from stride 4 on, the "
            f"finest first (of timm: features_only=True)"
        )
    if isinstance(output, Mapping):
        return f"{name} with the keys {', '.join(map(str, output))}. Return its maps as a list, the finest first"
    if output is None:
        return "None: its forward returns nothing"
    if not isinstance(output, (list, tuple)):
        return f"{name}. Return the map of every stage from stride 4 on, the finest first"
    odd = [(i, m) for i, m in enumerate(output) if not (isinstance(m, Tensor) and m.dim() == 4)]
    if not odd:
        return f"{name} without any. Return the map of every stage from stride 4 on, the finest first"
    number, item = odd[0]
    shape = f" of shape {tuple(item.shape)}" if isinstance(item, Tensor) else ""
    return f"{name} whose item {number} is a {type(item).__name__}{shape}. Return nothing but maps, the finest first"


def find_pyramid(
    network: nn.Module, input_size: tuple[int, int], stages: int | None = None, in_chans: int = 3
) -> Pyramid:
    """Find the levels of a network, on the meta device.

    Args:
        network: returns a list of feature maps.
        input_size: (H, W) in pixels.
        stages: keep the first so many levels, all by default.
        in_chans: channels of the images.

    Raises:
        ValueError: the network does not take such images, returns no pyramid of factors of two or fewer levels than
            asked for, or the size is off the patch grid.
    """
    shapes, odd = _shapes(network, input_size, in_chans)
    strides = _strides(shapes, input_size)
    if len(set(strides)) < len(strides):  # of an image smaller than a patch: padding rounds its maps up
        larger = (8 * input_size[0], 8 * input_size[1])
        with suppress(ValueError):
            strides = _strides(_shapes(network, larger, in_chans)[0], larger)
    levels = [i for i, stride in enumerate(strides) if stride >= MIN_STRIDE]
    if stages is not None and not 1 <= stages <= len(levels):
        raise ValueError(f"stages must be from 1 to {len(levels)}, the levels of this network, got {stages}")
    levels = levels[:stages]
    found = Pyramid(levels, [shapes[i][1] for i in levels], [strides[i] for i in levels])
    _check(found, shapes, input_size, odd)
    return found


def run_on_meta(module: nn.Module, *args: object) -> list[Tensor]:
    """`module(*args)` in evaluation mode on the meta device, to learn shapes; nothing is computed, nothing changed.

    Returns its output, for a network its maps (B, C_i, H_i, W_i).
    """
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    state = {name: torch.empty_like(t, device="meta") for name, t in tensors}
    with (
        evaluation_mode(module),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        return functional_call(module, state, args)


def meta_images(network: nn.Module, count: int, input_size: tuple[int, int], in_chans: int = 3) -> Tensor:
    """(count, C, H, W) of the network's dtype, without content."""
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    return torch.empty(count, in_chans, *input_size, dtype=dtype, device="meta")


class Running:
    """Where in a network an error was raised: the modules whose `forward` runs, outermost first."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.stack: list[tuple[str, nn.Module, tuple]] = []  # path, module, its inputs
        self.first: nn.Module | None = None  # the first that is entered and has no children
        self.first_size: tuple[int, ...] | None = None  # (H, W) of what it is given
        self._hooks = ExitStack()

    def __enter__(self) -> Running:
        for path, module in self.network.named_modules():

            def enter(module: nn.Module, inputs: tuple, path: str = path) -> None:
                self.stack.append((path, module, inputs))
                if self.first is None and not module._modules:
                    self.first = module
                    self.first_size = next((tuple(x.shape[2:]) for x in inputs if getattr(x, "ndim", 0) == 4), None)

            self._hooks.enter_context(module.register_forward_pre_hook(enter))
            self._hooks.enter_context(module.register_forward_hook(lambda *_: self.stack.pop() and None))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def explain(self, error: Exception, size: tuple[int, int]) -> ValueError:
        """The same error, said of the network and of the module in whose code it was raised."""
        fails = f"the network does not run on {size[0]}x{size[1]} images"
        path, module, inputs = self.stack[-1] if self.stack else ("", self.network, ())
        place = f"{path or 'the network itself'} ({type(module).__name__})"
        wanted = getattr(module, "in_channels", None)
        got = inputs[0].shape[1] if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 4 else None
        if None not in (wanted, got) and wanted != got:
            takes = f"takes {wanted} channel{'s' * (wanted != 1)}"
            return NetworkFormError(
                f"{fails}: its first layer, {place}, {takes}, and images have {got}. Build the network for {got} "
                f"(of timm: in_chans={got}), or give in_chans {wanted}, as many as it takes"
                if module is self.first and got == self.stack[0][2][0].shape[1]
                else f"{fails}: {place} {takes} and is given {got}"
            )
        if "meta tensor" in str(error):
            return NetworkFormError(
                f"{fails}: the code of {place} looks at the values of a tensor, as by .item() or `if` ({error}). "
                f"Decide by shapes alone: they are found without computing anything"
            )
        return ValueError(f"{fails}: in the code of {place}: {error or type(error).__name__}")


def _shapes(network: nn.Module, input_size: tuple[int, int], in_chans: int) -> tuple[list[tuple[int, ...]], str]:
    """Of the maps, and what may be wrong with them."""
    images = meta_images(network, 1, input_size, in_chans)
    _check_arguments(network, images)
    with Running(network) as running:
        try:
            maps = run_on_meta(network, images)
        except Exception as error:
            raise running.explain(error, input_size) from error
    shapes = [tuple(m.shape) for m in _channels_first(network, maps)]
    return shapes, _oddities(network, running.first_size or input_size, input_size)


def _strides(shapes: list[tuple[int, ...]], input_size: tuple[int, int]) -> list[int]:
    return [2 ** round(math.log2(input_size[0] / shape[2])) for shape in shapes]


def _check_arguments(network: nn.Module, images: Tensor) -> None:
    signature = inspect.signature(network.forward)
    try:
        signature.bind(images)
    except TypeError as error:
        raise NetworkFormError(
            f"the network's forward{signature} cannot be called with images alone: {error}. Give the other arguments "
            f"defaults, or wrap the network in a module whose forward takes images"
        ) from error


def _check(found: Pyramid, shapes: list[tuple[int, ...]], input_size: tuple[int, int], odd: str) -> None:
    """Refuse levels that are no pyramid on the patch grid; `odd` says which layers may be at fault, "": none."""
    strides, size = found.strides, f"{input_size[0]}x{input_size[1]}"
    patch = strides[-1] if strides else 0
    if not strides or any(s * 2 ** (len(strides) - 1 - i) != patch for i, s in enumerate(strides)):
        why = odd or _advice(strides)
        raise ValueError(f"feature maps must be a pyramid, each half the one before; strides are {strides}: {why}")
    if any(side % patch for side in input_size):
        raise ValueError(f"input size {size} is not a multiple of the patch, {patch} px")
    for level, stride in zip(found.levels, strides, strict=True):
        expected, got = (input_size[0] // stride, input_size[1] // stride), shapes[level]
        if got[2:] != expected:
            turned = f'channels come last, {got}. Return map.permute(0, 3, 1, 2), or set network.output_fmt = "NHWC"'
            why = odd or (turned if got[1:3] == expected else "patches do not stay aligned. Pad layers to exact halves")
            raise ValueError(
                f"feature map {level} is {got[2]}x{got[3]}, where stride {stride} of {size} px gives "
                f"{expected[0]}x{expected[1]}: {why}"
            )


def _oddities(network: nn.Module, first: tuple[int, ...], input_size: tuple[int, int]) -> str:
    """What keeps patches from staying aligned: what the first layer is given, strides that are no powers of two."""
    if first != input_size:
        return (
            f"its own forward gives the first layer {first[0]}x{first[1]} px in place of the image's {input_size[0]}x"
            f"{input_size[1]}, so patches do not stay aligned. Pad or resize in a layer (nn.ZeroPad2d, nn.Upsample), "
            f"or do it to the images, before the network"
        )
    for path, module in network.named_modules():
        stride = getattr(module, "stride", 1)
        for side in stride if isinstance(stride, tuple) else (stride,):
            if isinstance(side, int) and side & (side - 1):
                return (
                    f"{path} ({type(module).__name__}) has stride {side}, and only powers of two keep patches aligned"
                )
    return ""


def _advice(strides: list[int]) -> str:
    """What to do about strides that are no pyramid."""
    if not strides:
        return f"no map is as coarse as stride {MIN_STRIDE}. Return coarser ones"
    if len(set(strides)) < len(strides):
        return "two maps have one stride. Return one of each stride, the last"
    if strides != sorted(strides):
        return "they come in another order. Return the finest map first, the coarsest last"
    missing = [s for s in (strides[0] * 2**i for i in range(1, 10)) if s < strides[-1] and s not in strides]
    return f"none has stride {missing[0]}. Return that one too, or stop before it"
