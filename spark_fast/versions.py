"""The version of this program, and those of what computes for it.

Nothing heavy is imported before it is asked for: every command tells its version at once.
"""

from __future__ import annotations

import platform

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Package -> version: what decides the numbers that a run computes."""
    import numpy
    import timm
    import torch
    import torchvision

    return {
        "spark_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
