"""Checks what a run needs of this machine, quickly and without importing anything heavy."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import shutil
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ropewalk.infra.mlflow_database import default_tracking_uri, sqlite_path
from ropewalk.infra.scrub import scrub_text

PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "mlflow",
    "datasets",
    "pyarrow",
    "pydantic",
    "bm25s",
    "faiss-cpu",
    "matplotlib",
)
MIN_TRANSFORMERS = (5, 16)
MIN_FREE_GIB = 5.0
MIN_SHM_GIB = 1.0
MIN_MEMORY_GIB = 4.0
MAX_CLOCK_SKEW_SECONDS = 60.0
EARLIEST_YEAR = 2025
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool | None
    """None: nothing wrong, but worth knowing, or it could not be found out."""
    message: str


def diagnose(store_root: Path) -> list[Check]:
    """All checks, in the order in which a user would fix things. The store's folder is made if it is not there."""
    checks: list[Callable[[], Check]] = [
        check_python,
        check_packages,
        check_import_names,
        lambda: check_store(store_root),
        lambda: check_disk(store_root),
        check_shared_memory,
        check_memory,
        check_ray_authentication,
        lambda: check_mlflow(store_root),
        lambda: check_clock(default_tracking_uri(store_root)),
    ]
    return [check() for check in checks]


def check_python() -> Check:
    """The Python version."""
    return Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or later is needed)")


def check_packages() -> Check:
    """The packages are installed, and transformers is recent enough to live beside a folder called `kernels`."""
    found, missing = {}, []
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", False, f"missing: {', '.join(missing)}; pip install -e . installs them")
    if _version(found["transformers"]) < MIN_TRANSFORMERS:
        needed = ".".join(map(str, MIN_TRANSFORMERS))
        return Check("packages", False, f"transformers {found['transformers']} is too old: {needed} is needed")
    return Check("packages", True, ", ".join(f"{name} {version}" for name, version in found.items()))


def check_import_names() -> Check:
    """No regular package in the working directory hides Hugging Face's `kernels`, which transformers imports.

    A folder of that name without `__init__.py` is harmless: an installed package goes before it.
    """
    spec = PathFinder.find_spec("kernels", [str(Path.cwd())])
    if spec is not None and spec.origin:
        message = f"{spec.origin} hides Hugging Face's package `kernels` and breaks transformers: rename or delete it"
        return Check("import names", False, message)
    return Check("import names", True, "nothing here hides the package `kernels`")


def check_store(store_root: Path) -> Check:
    """The store's file system creates a name exclusively, on which commits rest."""
    probe = store_root / f".probe-{uuid.uuid4().hex}"
    first, second = probe.with_suffix(".first"), probe.with_suffix(".commit")
    try:
        store_root.mkdir(parents=True, exist_ok=True)
        first.write_text("probe", encoding="utf-8")
        os.link(first, second)
        try:
            os.link(first, second)
        except FileExistsError:
            return Check("store", True, f"{store_root}: exclusive creation works")
        return Check("store", False, f"{store_root}: a name was created twice; use a file system with hard links")
    except OSError as error:
        reason = error.strerror or str(error)
        return Check("store", False, f"{store_root}: {reason}; give --store a folder on a file system with hard links")
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def check_disk(store_root: Path) -> Check:
    """Free space where the store lies."""
    folder = next((path for path in (store_root, *store_root.absolute().parents) if path.exists()), Path("/"))
    free_gib = shutil.disk_usage(folder).free / GIB
    enough = free_gib >= MIN_FREE_GIB
    message = f"{free_gib:.1f} GiB free for {store_root}"
    return Check("disk", enough, message if enough else f"{message}; the quickstart wants {MIN_FREE_GIB:.0f}")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """/dev/shm, where Ray keeps its objects; containers often have 64 MB."""
    if not path.exists():
        return Check("shared memory", None, f"{path} does not exist: Ray falls back to files, which is slower")
    total_gib = shutil.disk_usage(path).total / GIB
    message = f"{path} has {total_gib:.1f} GiB"
    if total_gib >= MIN_SHM_GIB:
        return Check("shared memory", True, message)
    return Check("shared memory", False, f"{message}: start the container with --shm-size=2g or more")


def check_memory() -> Check:
    """Memory that this process may use, by its control group if that is narrower than the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text(encoding="utf-8")))
    gib = total / GIB
    message = f"{gib:.1f} GiB, {os.cpu_count()} processors"
    return Check("memory", gib >= MIN_MEMORY_GIB, message + ("" if gib >= MIN_MEMORY_GIB else "; 4 GiB are needed"))


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
    except OSError as error:
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
    except OSError:
        return Check("clock", None, "the MLflow server's clock could not be read")
    if date is None:
        return Check("clock", None, "the MLflow server does not tell the time")
    skew = abs(parsedate_to_datetime(date).timestamp() - now)
    agrees = skew <= MAX_CLOCK_SKEW_SECONDS
    return Check("clock", agrees, f"{skew:.0f} s from the MLflow server's" + ("" if agrees else ": set one of them"))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
