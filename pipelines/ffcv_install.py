"""Whether FFCV is there, and what to do if not."""

from __future__ import annotations

import torch

from spark_fast.commands import INSTALL_FFCV
from spark_fast.errors import SettingsError


def require_ffcv(purpose: str) -> None:
    """Raise SettingsError, with the command that installs it, when FFCV cannot be imported; `purpose` needs it."""
    threads = torch.get_num_threads()
    try:
        import ffcv.loader  # noqa: F401
    except (ImportError, OSError) as error:
        raise SettingsError(
            f"{purpose} needs FFCV, which cannot be imported ({error}). Install it with\n  {INSTALL_FFCV}"
        ) from error
    finally:
        torch.set_num_threads(threads)  # FFCV's import sets it to 1, for the whole process
