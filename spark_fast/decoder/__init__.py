"""What SparK adds to its encoder: levels laid out on the whole map, and the light UNet."""

from spark_fast.decoder.unet import Decoder, UNetBlock

__all__ = ["Decoder", "UNetBlock"]
