"""What a data path on a server is: a folder of shards as `s3://bucket/folder`, `gs://` or `https://`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeGuard

from spark_fast.errors import SettingsError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"\?[^\s'\")]*")


def is_remote(data_path: str | Path | None) -> TypeGuard[str]:
    """Whether a data path is a URL rather than a place in the file system."""
    return isinstance(data_path, str) and _URL.match(data_path) is not None


def refuse_credentials(url: str) -> None:
    """Raise SettingsError, which does not repeat them, where a URL holds a password, a key or a token.

    A data path is written to the log, to config.toml and to every checkpoint.
    """
    if is_remote(url) and (_USER.search(url) or _QUERY.search(url)):
        raise SettingsError(
            f"the data path {without_credentials(url)} has a user, password or query, which would be logged and"
            " stored. Put them into the environment, where fsspec looks for them (docs/how_to/remote.md)."
        )


def without_credentials(text: str) -> str:
    """A message of a library, without what stands before the @ or after the ? of the URLs in it."""
    return _QUERY.sub("?...", _USER.sub("...@", text))
