"""FCMAE on one page (Woo et al., "ConvNeXt V2", CVPR 2023, section 3): encode what is visible, decode with one block.

The encoder's last level alone is used. A 1x1 convolution takes its visible cells to the decoder's width, a learned
token stands in the masked ones, ConvNeXt V2 blocks run on the whole grid, and a 1x1 convolution predicts the pixels of
each masked patch. The loss is SparK's (`Method.forward`). At one cell a patch it costs a seventieth of SparK's decoder.

Global response normalisation in the encoder is over the visible cells of each image, as in the network that is then
fine-tuned. The published sparse layer takes it over all images of the batch together; with one image they agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from spark_fast import method
from spark_fast.encoder import Encoder, VisiblePatches
from spark_fast.method import Method, Recipe


def _decays(name: str, value: Tensor) -> bool:
    """As published: not on 1-d tensors and biases, but on those of GRN, which have two dimensions there."""
    return ".grn." in name or (value.dim() != 1 and not name.endswith(".bias"))


class FCMAE(Method):
    """A decoder of ConvNeXt V2 blocks on the patch grid.

    Args:
        encoder: an encoder of visible patches; only its last level is used.
        input_size: (H, W) in pixels.
        mask_ratio: share of the patches hidden; h*w*(1 - mask_ratio) is rounded down, as published.
        decoder_width: channels of the decoder.
        decoder_depth: its blocks.

    Raises:
        ValueError: a mask ratio, width or depth that does not fit.
    """

    options = ("decoder_width", "decoder_depth")
    recipe = Recipe(
        settings={
            **{"optimizer": "adamw", "beta2": 0.95, "base_lr": 1.5e-4, "weight_decay": 0.05, "weight_decay_end": 0.05},
            **{"clip": 0.0, "epochs": 800, "min_crop": 0.2, "decoder_width": 512, "drop_path": 0.0},
        },
        first_lr=0.0,
        last_lr=0.0,
        closed=False,
        decays=_decays,
    )
    rounds_down = True

    def __init__(
        self,
        encoder: Encoder,
        input_size: tuple[int, int],
        mask_ratio: float = 0.6,
        decoder_width: int = 512,
        decoder_depth: int = 1,
    ) -> None:
        super().__init__(encoder, input_size, mask_ratio)
        if min(decoder_width, decoder_depth) < 1:
            raise ValueError(f"decoder_width {decoder_width} and decoder_depth {decoder_depth} must be at least 1")
        self.proj = nn.Conv2d(encoder.channels[-1], decoder_width, kernel_size=1)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, decoder_width, 1, 1), std=0.02))
        blocks = [ConvNeXtBlock(decoder_width, use_grn=True, ls_init_value=None) for _ in range(decoder_depth)]
        self.decoder = nn.Sequential(*blocks)
        self.pred = nn.Conv2d(decoder_width, self.in_chans * self.patch**2, kernel_size=1)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(_initialize)

    def decode(self, features: list[Tensor], visible: VisiblePatches, on: VisiblePatches) -> Tensor:
        """See `Method.decode`: (M, C, p, p). The head gives p*p*C numbers a patch, channels innermost, as published."""
        cells = _pointwise(self.proj, features[-1])  # (V, width, 1, 1)
        grid = self.decoder(visible.unpack(cells, fill=self.mask_token.flatten()))  # (B*K, width, h, w)
        pixels = _pointwise(self.pred, on.pack(grid))  # (M, p*p*C, 1, 1)
        return pixels.view(-1, self.patch, self.patch, self.in_chans).permute(0, 3, 1, 2)


def build_fcmae(
    model: str | nn.Module = "convnextv2_tiny",
    *,
    input_size: int | tuple[int, int] = 224,
    mask_ratio: float = 0.6,
    decoder_width: int = 512,
    decoder_depth: int = 1,
    encoder: str = "packed",
    model_kwargs: dict | None = None,
    stages: int | None = None,
    in_chans: int = 3,
    sync_batchnorm: bool = False,
    check: bool | None = None,
) -> FCMAE:
    """Build FCMAE around a ConvNet; arguments and errors as those of `spark_fast.build_spark`.

    Args:
        decoder_width: channels of the decoder.
        decoder_depth: its ConvNeXt V2 blocks.
    """
    return method.build(
        FCMAE,
        model,
        input_size=input_size,
        mask_ratio=mask_ratio,
        encoder=encoder,
        model_kwargs=model_kwargs,
        stages=stages,
        in_chans=in_chans,
        sync_batchnorm=sync_batchnorm,
        check=check,
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
    )


def _pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of (N, C, 1, 1) as the matrix product that it is: on a CPU six to nine times sooner."""
    return F.linear(x.flatten(1), layer.weight.flatten(1), layer.bias)[..., None, None]


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
