"""A real S3 server on loopback: moto's, which keeps its buckets in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import boto3
import s3fs
from moto.server import ThreadedMotoServer


@contextmanager
def s3_of(folder: Path, bucket: str = "shards") -> Iterator[str]:
    """The URL of a bucket with the files of a folder; meanwhile the environment says where and by which key."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    given = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "never-logged", "AWS_ENDPOINT_URL": endpoint}
    s3fs.S3FileSystem.clear_instance_cache()  # of a server before
    try:
        with patch.dict(os.environ, given | {"AWS_DEFAULT_REGION": "us-east-1"}):
            client = boto3.client("s3")
            client.create_bucket(Bucket=bucket)
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                client.upload_file(str(path), bucket, path.relative_to(folder).as_posix())
            yield f"s3://{bucket}"
    finally:
        server.stop()
