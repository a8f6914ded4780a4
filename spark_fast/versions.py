"""The versions that decide what is computed."""

from __future__ import annotations

import platform

import numpy
import timm
import torch
import torchvision

import spark_fast


def versions() -> dict[str, str]:
    """Package -> version, of this program and of what computes for it."""
    return {
        "spark_fast": spark_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
