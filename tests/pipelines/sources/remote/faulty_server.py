"""A real HTTP server on loopback that answers the requests it is told to with a fault."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("500", "503", "404", "403", "truncated", "short", "wrong", "longer", "reset", "silent", "empty")


class FaultyServer(ThreadingHTTPServer):
    """Serves `folder`; each request of a file takes the next of the faults that wait for it, and is counted."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}  # by file
        self.always: str = ""  # the fault of every request
        self.asked: Counter[str] = Counter()
        self.met: Counter[str] = Counter()  # faults
        self.over = threading.Event()  # the silent ones may end
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that are reset are part of it."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        name, server = self.path.lstrip("/"), self.server
        with server.guard:
            server.asked[name] += with_body
            waiting = server.faults.get(name, []) if with_body else []
            fault = waiting.pop(0) if waiting else server.always
            server.met[fault] += 1
        path = server.folder / name
        if not path.is_file() or fault in ("500", "503", "404", "403"):
            return self.send_error(int(fault) if fault.isdigit() else 404)
        body = path.read_bytes()
        sent = {
            "truncated": body[: len(body) // 2],
            "short": body[: len(body) // 2],
            "wrong": body[:600] + bytes([body[600] ^ 1]) + body[601:] if len(body) > 600 else body[::-1],
            "longer": body + bytes(1024),
            "empty": b"",
        }.get(fault, body)
        if fault == "silent":
            server.over.wait()
            return None
        if fault == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(body if fault == "truncated" else sent)))
        self.end_headers()
        if with_body:
            self.wfile.write(sent)
        if fault == "truncated":
            self.close_connection = True
        return None


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
