from __future__ import annotations

from pathlib import Path

import pytest

from spark_fast.errors import SettingsError
from spark_fast.pipelines.sources.remote.url import is_remote, refuse_credentials, without_credentials


@pytest.mark.parametrize("url", ["s3://bucket/a", "gs://bucket", "https://host/a", "memory://a", "file:///data"])
def test_a_url_is_on_a_server(url):
    assert is_remote(url)
    refuse_credentials(url)


@pytest.mark.parametrize("path", ["/data", "data", "~/data", "a:b", Path("s3://bucket"), "odd?name=1", None, ""])
def test_anything_else_is_a_place_on_the_disk(path):
    assert not is_remote(path)
    if isinstance(path, str):
        refuse_credentials(path)


@pytest.mark.parametrize(
    "url", ["https://me:secret@host/a", "s3://key:secret@bucket/a", "https://host/a?X-Amz-Signature=secret"]
)
def test_a_url_with_a_secret_is_refused_without_saying_it(url):
    with pytest.raises(SettingsError, match=r"user, password or query, which would be logged") as caught:
        refuse_credentials(url)
    assert "secret" not in str(caught.value)


def test_messages_of_others_lose_their_secrets_and_no_more():
    said = "403, url='https://me:secret@host/a.tar?sig=secret&x=secret' (and https://host/b?c), a@b"
    assert without_credentials(said) == "403, url='https://...@host/a.tar?...' (and https://host/b?...), a@b"
