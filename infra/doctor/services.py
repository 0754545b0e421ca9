"""Checks of what a run talks to: the store, a Ray cluster, MLflow."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ropewalk.infra.doctor.machine import Check
from ropewalk.infra.objects import Objects
from ropewalk.infra.remote.reachable import why_endpoint_silent
from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.database import default_tracking_uri, sqlite_path

MAX_CLOCK_SKEW_SECONDS = 60.0
EARLIEST_YEAR = 2025
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION (and AWS_ENDPOINT_URL, if it is not Amazon's)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def check_store(store_uri: str) -> Check:
    """The store can be written, read and listed, and creates a name exclusively, on which commits rest."""
    try:
        store = Store(store_uri)
        _require_endpoint(store)
        created_twice = _probe(store.objects)
    except UserError as error:
        return Check("store", False, str(error))
    except OSError as error:
        # The client of an object store says it all in one line; of a file, only the folder matters here.
        reason = f"{store_uri}: {error.strerror}" if error.strerror else str(error)
        return Check("store", False, f"{reason}; {_advice(store_uri)}")
    if created_twice:
        where = "a file system with hard links" if store.is_local else "an object store with conditional writes"
        return Check("store", False, f"{store.uri}: a name was created twice, commits are not safe; take {where}")
    return Check("store", True, f"{store.uri}: can be read and written, exclusive creation works")


def _probe(objects: Objects) -> bool:
    """Write, read, list and remove an object; returns whether it could be created twice."""
    folder = f".probe-{uuid.uuid4().hex}"
    first = objects.create(f"{folder}/0", b"first")
    try:
        second = objects.create(f"{folder}/0", b"second")
        if not first or objects.read(f"{folder}/0") not in (b"first", b"second") or objects.names(folder) != ["0"]:
            raise OSError(f"{objects.uri}: what was written a moment ago cannot be read or listed")
    finally:
        objects.remove(folder)
    return second


def _require_endpoint(store: Store) -> None:
    """Fail at once where the client would try for a minute: nobody listens at the address the environment names."""
    reason = why_endpoint_silent(store.uri)
    if reason:
        raise UserError(reason)


def _advice(store_uri: str) -> str:
    if "://" not in store_uri:
        return "give --store a folder on a file system with hard links that you may write to"
    scheme = store_uri.partition("://")[0]
    return f"check that it exists and that it is reachable, and set {CREDENTIALS[scheme]}"


def check_ray_authentication() -> Check:
    """RAY_AUTH_MODE agrees with the tokens around.

    Since 2.59 a local `ray.init` leaves a token in ~/.ray, and a cluster started later demands it; a client whose own
    mode is not `token` then fails with "no authentication token was found".
    """
    name = "ray authentication"
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    if mode == "token" and not has_token:
        message = f"RAY_AUTH_MODE=token, but there is no token in {path}: run `ray get-auth-token --generate`"
        return Check(name, False, message)
    if mode in ("", "disabled") and has_token:
        unset = "RAY_AUTH_MODE is not set" if not mode else "RAY_AUTH_MODE=disabled"
        message = f"{unset} and there is a token: to use a cluster that demands it, export RAY_AUTH_MODE=token"
        return Check(name, None, message)
    if mode not in ("", "disabled", "token"):
        return Check(name, False, f"RAY_AUTH_MODE={mode} is unknown: use token or disabled")
    return Check(name, True, "tokens in use" if mode == "token" else "off")


def check_cluster(address: str) -> Check:
    """A Ray cluster answers and takes the login; its dashboard's address is given, as for `submit`."""
    from ropewalk.infra.jobs.submit import describe_cluster

    try:
        return Check("ray cluster", True, f"{address}: {describe_cluster(address)}")
    except UserError as error:
        return Check("ray cluster", False, str(error))


def check_mlflow(store_root: Path) -> Check:
    """MLflow can be reached where runs will be tracked."""
    uri = default_tracking_uri(store_root)
    shown = scrub_text(uri)
    database = sqlite_path(uri)
    if database is not None:
        if database.exists():
            ok = os.access(database, os.R_OK | os.W_OK)
            return Check("mlflow", ok, shown if ok else f"{shown} cannot be written: change its permissions")
        return Check("mlflow", True, f"{shown} (made by the first run)")
    if not uri.startswith(("http://", "https://")):
        return Check("mlflow", None, f"{shown} is not checked")
    return _check_server(uri, shown)


def _check_server(uri: str, shown: str) -> Check:
    name = "mlflow"
    request = _request(uri, "/api/2.0/mlflow/experiments/search", json.dumps({"max_results": 1}).encode())
    try:
        with urllib.request.urlopen(request, timeout=10):
            return Check(name, True, f"{shown} answers")
    except urllib.error.HTTPError as error:
        text = error.read(1000).decode(errors="replace")
        if error.code == 403 and "Host" in text:
            hint = f"start the server with --allowed-hosts {urlsplit(uri).netloc.rpartition('@')[2]}"
            return Check(name, False, f"{shown} refuses this name of it (Invalid Host header): {hint}")
        if error.code in (401, 403):
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            return Check(name, False, f"{shown} refuses the login (status {error.code}): {hint}")
        return Check(name, False, f"{shown} answers with status {error.code}: is it an MLflow server?")
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        return Check(name, False, f"{shown} does not answer ({reason}): start it, or unset MLFLOW_TRACKING_URI")


def _request(uri: str, path: str, body: bytes | None = None) -> urllib.request.Request:
    """A request as MLflow's client would make it, with the credentials of the URI or the environment."""
    parts = urlsplit(uri)
    userinfo, _, host = parts.netloc.rpartition("@")
    username = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if not userinfo and username:
        userinfo = f"{username}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    request = urllib.request.Request(f"{parts.scheme}://{host}{parts.path.rstrip('/')}{path}", body)
    request.add_header("Content-Type", "application/json")
    if userinfo:
        request.add_header("Authorization", "Basic " + base64.b64encode(unquote(userinfo).encode()).decode())
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    return request


def check_clock(tracking_uri: str) -> Check:
    """The clock is plausible, and agrees with the MLflow server's where there is one: run ids and metrics use it."""
    now = time.time()
    if time.gmtime(now).tm_year < EARLIEST_YEAR:
        return Check("clock", False, f"the clock says {time.ctime(now)}: set it")
    if not tracking_uri.startswith(("http://", "https://")):
        return Check("clock", True, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))
    try:
        with urllib.request.urlopen(_request(tracking_uri, "/health"), timeout=10) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    except (OSError, HTTPException):
        return Check("clock", None, "the MLflow server's clock could not be read")
    if date is None:
        return Check("clock", None, "the MLflow server does not tell the time")
    skew = abs(parsedate_to_datetime(date).timestamp() - now)
    agrees = skew <= MAX_CLOCK_SKEW_SECONDS
    return Check("clock", agrees, f"{skew:.0f} s from the MLflow server's" + ("" if agrees else ": set one of them"))
