"""Encoders of visible patches: one mathematics, computed packed or masked."""

from spark_fast.encoder.encoder import Encoder, MaskedEncoder, PackedEncoder, pack
from spark_fast.encoder.layer_registry import UnsupportedLayerError, register
from spark_fast.encoder.visible import VisiblePatches

__all__ = ["Encoder", "MaskedEncoder", "PackedEncoder", "UnsupportedLayerError", "VisiblePatches", "pack", "register"]
