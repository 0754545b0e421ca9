"""An S3 server that cannot be relied on: requests do not arrive, are served with the answer lost, or are refused."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

from object_store_server import object_store_server

Fault = Literal["none", "not arrived", "answer lost", "busy"]
Choose = Callable[[str, str], Fault]
"""What happens to a request, given its method and path."""
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length"}


class UnreliableProxy:
    """Forwards to a server, except where `choose` says otherwise; `met` counts what happened."""

    def __init__(self, target: str, choose: Choose) -> None:
        self.choose = choose
        self.met: Counter[Fault] = Counter()
        self._target = urlsplit(target).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *arguments: object) -> None:
                """Clients that are killed are part of the game."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        fault = self.choose(request.command, request.path)
        self.met[fault] += 1
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if fault == "busy":
            self._answer(request, 503, {"Content-Length": "4"}, b"busy")
            return
        if fault != "not arrived":
            connection = http.client.HTTPConnection(self._target)
            with contextlib.closing(connection):
                connection.request(request.command, request.path, body, dict(request.headers))
                served = connection.getresponse()
                content, headers = served.read(), dict(served.getheaders())
            if fault == "none":
                kept = {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
                length = headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(content))
                self._answer(request, served.status, {**kept, "Content-Length": length}, content)
                return
        request.close_connection = True

    def _answer(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        request.send_response_only(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    def __enter__(self) -> UnreliableProxy:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def reliable(method: str, path: str) -> Fault:
    """Nothing goes wrong."""
    return "none"


def sometimes(share: float) -> Choose:
    """Of all requests, this share goes wrong in one of the three ways."""
    faults: tuple[Fault, ...] = ("not arrived", "answer lost", "busy")
    return lambda method, path: random.choice(faults) if random.random() < share else "none"


@contextlib.contextmanager
def unreliable_server(choose: Choose = reliable) -> Iterator[UnreliableProxy]:
    """Serve S3 behind the proxy, and point this process's environment, and so its children's, to the proxy."""
    with object_store_server() as address, UnreliableProxy(address, choose) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        yield proxy
