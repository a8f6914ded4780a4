from __future__ import annotations

import pytest

from spark_fast.pipelines.sources.remote import server
from tests.pipelines.sources.remote.faulty_server import serving
from tests.pipelines.sources.ten_images import write_all


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(server, "PAUSES", (0.0,) * 8)


@pytest.fixture
def shards(tmp_path):
    return write_all(tmp_path / "shards")


@pytest.fixture
def in_memory(shards):
    """The URL of the ten images in three shards, in fsspec's memory."""
    files = pytest.importorskip("fsspec").filesystem("memory")
    for path in shards.iterdir():
        files.pipe_file(f"/{shards}/{path.name}", path.read_bytes())
    yield f"memory:/{shards}"
    files.rm(f"/{shards}", recursive=True)


@pytest.fixture
def over_http(shards):
    """A server of the same, which answers with the faults it is told to."""
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for https://: pip install 'spark-fast[test]'")
    with serving(shards) as server:
        yield server
