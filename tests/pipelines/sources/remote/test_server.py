from __future__ import annotations

import pickle
import sys
import threading

import pytest

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.sources.remote import server as tested
from spark_fast.pipelines.sources.remote.server import DamagedError, Server, StoppedError


@pytest.fixture
def server():
    pytest.importorskip("fsspec")
    return Server("memory://somewhere/")


def test_what_fails_is_tried_again(server, monkeypatch, caplog):
    monkeypatch.setattr(tested, "PAUSES", (0.01, 0.02, 0.04))
    failures = iter([OSError("one"), TimeoutError(), DamagedError("three")])

    def attempt():
        if error := next(failures, None):
            raise error
        return "done"

    assert server.patiently("a.tar", attempt) == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "memory://somewhere/a.tar: attempt 1 of 4 failed, the next in 0.01 s: OSError: one",
        "memory://somewhere/a.tar: attempt 2 of 4 failed, the next in 0.02 s: TimeoutError",
        "memory://somewhere/a.tar: attempt 3 of 4 failed, the next in 0.04 s: DamagedError: three",
    ]


def test_the_pauses_double_and_the_server_may_be_gone_for_a_minute_and_a_half(monkeypatch):
    monkeypatch.undo()  # the pauses as they are
    assert all(b <= 2 * a for a, b in zip(tested.PAUSES, tested.PAUSES[1:], strict=False))
    assert sum(tested.PAUSES) == 91.5


def failing(error, count):
    def attempt():
        count.append(error)
        raise error

    return attempt


def test_there_is_an_end_which_is_named_and_then_each_file_has_one_try(server):
    tries: list[Exception] = []
    with pytest.raises(DataError, match=r"^memory://somewhere/a.tar cannot be read after 9 attempts: OSError: gone$"):
        server.patiently("a.tar", failing(OSError("gone"), tries))
    assert len(tries) == 9
    with pytest.raises(DataError, match=r"b.tar cannot be read after 1 attempts"):
        server.patiently("b.tar", failing(OSError("gone"), tries))
    assert server.patiently("c.tar", lambda: 1) == 1
    with pytest.raises(DataError, match=r"a.tar cannot be read after 9 attempts"):
        server.patiently("a.tar", failing(OSError("gone"), tries))


@pytest.mark.parametrize(
    ("error", "said"),
    [(FileNotFoundError("x"), "the server has no such file"), (PermissionError("no"), "PermissionError: no")],
)
def test_what_is_not_there_or_not_allowed_has_fewer_tries(server, error, said):
    tries: list[Exception] = []
    with pytest.raises(DataError, match=f"after 3 attempts: {said}"):
        server.patiently("a.tar", failing(error, tries))
    assert len(tries) == 3


def test_a_stop_ends_the_waiting(server, monkeypatch):
    monkeypatch.setattr(tested, "PAUSES", (3600.0,))
    stop = threading.Event()

    def attempt():
        stop.set()
        raise OSError("gone")

    with pytest.raises(StoppedError):
        server.patiently("a.tar", attempt, stop)


def test_a_password_in_a_message_is_left_out(server):
    with pytest.raises(DataError) as caught:
        server.patiently("a", failing(OSError("403 for https://me:secret@host/a?sig=secret"), []))
    assert "secret" not in str(caught.value)
    assert "403 for https://...@host/a?..." in str(caught.value)


def test_a_download_that_is_too_slow_or_stopped_ends(in_memory, tmp_path, monkeypatch):
    server, told = Server(in_memory), []
    size = len(server.read("shard-000000.tar"))
    server.download("shard-000000.tar", size, tmp_path / "a", threading.Event(), told.append)
    assert (tmp_path / "a").read_bytes() == server.read("shard-000000.tar")
    assert told[-1] == size
    with pytest.raises(DamagedError, match=f"more than the {size - 1} bytes"):
        server.download("shard-000000.tar", size - 1, tmp_path / "a", threading.Event(), told.append)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        server.download("shard-000000.tar", size, tmp_path / "a", stop, told.append)
    monkeypatch.setattr(tested, "LONGEST_SECONDS", -10.0)
    with pytest.raises(TimeoutError, match="slower than 50 kB/s"):
        server.download("shard-000000.tar", size, tmp_path / "a", threading.Event(), told.append)


def test_it_may_be_sent_to_another_process(in_memory):
    assert pickle.loads(pickle.dumps(Server(in_memory))).read("manifest.json")


def test_in_another_process_it_is_opened_when_it_is_used(over_http, monkeypatch):
    """That process may be forked in between, and the thread of fsspec does not survive a fork."""
    sent = pickle.dumps(Server(over_http.url))
    opened, really = [], tested._open
    monkeypatch.setattr(tested, "_open", lambda url: opened.append(url) or really(url))
    there = pickle.loads(sent)
    assert not opened
    assert there.read("manifest.json") == there.read("manifest.json")
    assert opened == [over_http.url]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SettingsError, match=r"not installed .*: pip install 'spark-fast\[remote\]'"):
        Server("s3://bucket/a")


def test_a_url_of_nothing_known_is_refused():
    pytest.importorskip("fsspec")
    with pytest.raises(SettingsError, match="fsspec cannot open nowhere://a: Protocol not known: nowhere"):
        Server("nowhere://a")
