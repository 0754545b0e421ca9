"""Whether anybody listens at an address, told within seconds: clients of Ray and of object stores try for minutes."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

from ropewalk.infra.step import UserError

CONNECT_SECONDS = 10.0
PORTS = {"http": 80, "https": 443, "ray": 10001}


def why_unreachable(url: str) -> str | None:
    """Why nobody can be reached at `scheme://host:port`; None if somebody can."""
    parts = urlsplit(url)
    try:
        port = parts.port or PORTS[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def require_ray(address: str) -> None:
    """Refuse an address at which no Ray cluster can be: `auto`, `HOST:PORT` or `ray://HOST:PORT`. Raises UserError."""
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise UserError(f"--address {address} is a dashboard's, for `ropewalk submit`; a run takes HOST:6379")
    if not re.fullmatch(r"(ray://)?(\[[^/\]]+\]|[^/\s:]+):\d+", address):
        raise UserError(f"--address {address}: write it as HOST:PORT (of `ray start --head`), ray://HOST:PORT or auto")
    reason = why_unreachable(address if "://" in address else f"ray://{address}")
    if reason:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({reason}); check that it is up, or leave it out"
            " to run on this machine"
        )
