"""Whether anybody listens at an address, told within seconds: clients of Ray and of object stores try for minutes."""

from __future__ import annotations

import os
import re
import socket
from urllib.parse import urlsplit

from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.step import UserError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Variables that name another S3 server than Amazon's."""
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


def s3_endpoint(store_uri: str) -> tuple[str, str] | None:
    """The variable that names the server of an s3:// store, and its value; None if it is Amazon's."""
    named = [(name, os.environ[name]) for name in ENDPOINTS if os.environ.get(name)]
    return named[0] if named and store_uri.startswith("s3://") else None


def why_endpoint_silent(store_uri: str) -> str | None:
    """A sentence that names the server of an s3:// store if nobody answers there, where the client tries on."""
    endpoint = s3_endpoint(store_uri)
    reason = why_unreachable(endpoint[1]) if endpoint else None
    if endpoint is None or reason is None:
        return None
    return f"nothing answers at {scrub_text(endpoint[1])} ({reason}): start it, or change {endpoint[0]}"


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
