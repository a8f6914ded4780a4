"""The libraries that read scientific formats. They are optional; where one is missing, the message has the command."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from spark_fast.errors import SettingsError


def scientific(library: str, what: str) -> ModuleType:
    """The module of this name, which reads `what` ("TIFF files"); SettingsError where it is not installed."""
    try:
        return import_module(library)
    except ImportError as error:
        raise SettingsError(f"{what} need {library}: pip install 'spark-fast[scientific]' ({error})") from error
