"""SparK pre-training for any ConvNet, at the cost of the visible patches alone.

The public names are loaded when they are first used: `import spark_fast.pipelines` then costs no import of timm, which
takes seconds and would be paid by every process of the converter.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spark_fast.versions import __version__

if TYPE_CHECKING:
    from spark_fast.cli.train import pretrain
    from spark_fast.encoder import pack
    from spark_fast.encoder.verify import verify
    from spark_fast.fcmae import FCMAE, build_fcmae
    from spark_fast.spark import SparK, build_spark
    from spark_fast.weights.load import load_spark_state_dict

__all__ = [
    "FCMAE",
    "SparK",
    "__version__",
    "build_fcmae",
    "build_spark",
    "load_spark_state_dict",
    "pack",
    "pretrain",
    "verify",
]

_HOMES = {
    "FCMAE": "spark_fast.fcmae",
    "build_fcmae": "spark_fast.fcmae",
    "SparK": "spark_fast.spark",
    "build_spark": "spark_fast.spark",
    "load_spark_state_dict": "spark_fast.weights.load",
    "pack": "spark_fast.encoder",
    "pretrain": "spark_fast.cli.train",
    "verify": "spark_fast.encoder.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
