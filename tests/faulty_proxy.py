"""An HTTP proxy on loopback before a server, which can be switched into faults while requests come in."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["none", "refuse", "reset", "slow request", "slow answer", "500", "403", "401"]


class FaultyProxy:
    """Forwards to `target` as long as `fault` is "none"; `met` counts the requests by fault.

    refuse         the connection is closed without an answer, and the request never reaches the server
    reset          the request is served, and the connection is reset in the middle of the answer
    slow request   the request reaches the server only after `delay_seconds`: it is served when nobody waits for it
    slow answer    the request is served at once, the answer comes after `delay_seconds`
    500            the server fails
    403            the server is asked under a name that it refuses to serve
    401            the login is wrong
    """

    def __init__(self, target: str, delay_seconds: float = 30.0) -> None:
        self.fault: Fault = "none"
        self.met: Counter[Fault] = Counter()
        self.delay_seconds = delay_seconds
        self._target = urlsplit(target).netloc
        self._closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None:
                """Clients that no longer wait for an answer are part of the game."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        fault = self.fault
        self.met[fault] += 1
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if fault == "refuse":
            request.close_connection = True
            return
        if fault == "slow request":
            self._closing.wait(self.delay_seconds)
        if fault in ("500", "401"):
            self._answer(request, int(fault), b"broken on purpose", {})
            return
        host = "elsewhere.example" if fault == "403" else self._target
        connection = http.client.HTTPConnection(self._target)
        with contextlib.closing(connection):
            headers = {**request.headers, "Host": host, "Connection": "close"}
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        if fault == "slow answer":
            self._closing.wait(self.delay_seconds)
        if fault == "reset":
            _reset(request, content)
            return
        self._answer(request, answer.status, content, {"Content-Type": answer.getheader("Content-Type", "")})

    def _answer(self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _reset(request: BaseHTTPRequestHandler, content: bytes) -> None:
    """Send half of an answer, then what a server sends that crashes: RST instead of FIN."""
    request.close_connection = True
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())


@contextlib.contextmanager
def faulty_mlflow(root: Path, delay_seconds: float = 30.0) -> Iterator[FaultyProxy]:
    """A real MLflow server on the sqlite database of a store's folder, behind a proxy."""
    from ropewalk.infra.tracking.ui import mlflow_server

    with (
        mlflow_server(root, f"sqlite:///{root}/mlflow.db", "127.0.0.1", 0) as (_, url),
        FaultyProxy(url, delay_seconds) as proxy,
    ):
        yield proxy
