"""A server of Google Cloud Storage on loopback: gcp-storage-emulator, which keeps its buckets in memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from gcp_storage_emulator.server import create_server

# it would ask what kind of bucket this is, by gRPC, and wait a minute for an answer that the emulator does not give
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
import gcsfs


@contextmanager
def gs_of(folder: Path, bucket: str = "shards") -> Iterator[str]:
    """The URL of a bucket with the files of a folder; meanwhile the environment says where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gcsfs.GCSFileSystem.clear_instance_cache()  # of a server before
    with (
        create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket),
        patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "NO_GCE_CHECK": "true"}),
    ):
        gcsfs.GCSFileSystem(token="anon").put(f"{folder}/", f"{bucket}/", recursive=True)
        yield f"gs://{bucket}"
