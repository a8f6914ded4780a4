"""The commands as a message can tell the reader to type them, and the installation of what is optional.

Nothing heavy is imported here: the doctor reads this where torch does not load.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SCRIPTS = {  # command -> its script in tools/ of a checkout
    "convert": "convert_imagenet.py",
    "export": "export.py",
    "reconstruct": "reconstruct.py",
    "plot": "plot_run.py",
    "doctor": "doctor.py",
}
TOOLS = Path(__file__).parents[1] / "tools"

FFCV_SYSTEM_PACKAGES = ("libturbojpeg0-dev", "libopencv-dev", "pkg-config")  # FFCV is compiled against these
INSTALL_FFCV = (
    f"apt-get install -y --no-install-recommends {' '.join(FFCV_SYSTEM_PACKAGES)} && pip install 'spark-fast[ffcv]'"
)
INSTALL_DALI = "pip install 'spark-fast[dali]'"
INSTALL_REMOTE = "pip install 'spark-fast[remote]'"


def command(name: str) -> str:
    """How the user starts the command `name`, a key of SCRIPTS: as installed, else by what there is."""
    installed = f"spark-fast-{name}"
    if shutil.which(installed) or Path(sys.executable).with_name(installed).exists():
        return installed
    if (TOOLS / SCRIPTS[name]).is_file():
        return f"python tools/{SCRIPTS[name]}"
    return f"python -m spark_fast.cli.{name}"
