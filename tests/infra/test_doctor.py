"""The doctor sees what would spoil a run, says what to do, and is quick about it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ropewalk.infra import doctor
from ropewalk.infra.doctor import Check, diagnose


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@contextmanager
def server(status: int, text: str, date: str | None = None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An HTTP server that gives one answer to everything; its address, and the headers of the requests it got."""
    seen: list[dict[str, str]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response_only(status)
            if date:
                self.send_header("Date", date)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", seen
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str) -> Check:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return doctor.check_mlflow(tmp_path)


def test_this_machine_can_be_diagnosed(tmp_path: Path) -> None:
    checks = diagnose(tmp_path / "store")
    names = [check.name for check in checks]
    assert names == [
        "python",
        "packages",
        "import names",
        "store",
        "disk",
        "shared memory",
        "memory",
        "ray authentication",
        "mlflow",
        "clock",
    ]
    assert all(check.message for check in checks)
    assert {check.name: check.ok for check in checks}["store"] is True
    assert list((tmp_path / "store").iterdir()) == []


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ropewalk.infra.doctor import diagnose; diagnose(Path(sys.argv[1]));"
        "print({'torch', 'transformers', 'ray', 'mlflow', 'datasets', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("transformers", "no-such-distribution"))
    assert doctor.check_packages() == Check(
        "packages", False, "missing: no-such-distribution; pip install -e . installs them"
    )


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_TRANSFORMERS", (99, 0))
    check = doctor.check_packages()
    assert check.ok is False and "99.0 is needed" in check.message


def test_a_regular_package_called_kernels_is_found_and_a_plain_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernels").mkdir()
    assert doctor.check_import_names().ok
    (tmp_path / "kernels" / "__init__.py").touch()
    check = doctor.check_import_names()
    assert check.ok is False and str(tmp_path / "kernels" / "__init__.py") in check.message


def test_a_store_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    check = doctor.check_store(tmp_path / "store")
    assert check.ok is False and "--store" in check.message


def test_a_store_without_exclusive_creation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "link", lambda source, target: Path(target).write_text("overwritten"))
    check = doctor.check_store(tmp_path)
    assert check.ok is False and "created twice" in check.message
    assert list(tmp_path.iterdir()) == []


def test_little_disk_or_shared_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 1e9)
    monkeypatch.setattr(doctor, "MIN_SHM_GIB", 1e9)
    assert doctor.check_disk(tmp_path / "not" / "there").ok is False
    check = doctor.check_shared_memory(tmp_path)
    assert check.ok is False and "--shm-size" in check.message
    assert doctor.check_shared_memory(tmp_path / "missing").ok is None


def test_ray_tokens_and_mode_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_ray_authentication() == Check("ray authentication", True, "off")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check = doctor.check_ray_authentication()
    assert check.ok is False and "ray get-auth-token --generate" in check.message
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("t")
    assert doctor.check_ray_authentication().ok is True
    monkeypatch.delenv("RAY_AUTH_MODE")
    check = doctor.check_ray_authentication()
    assert check.ok is None and "export RAY_AUTH_MODE=token" in check.message
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    assert doctor.check_ray_authentication().ok is False


def test_no_server_is_an_error_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = mlflow(monkeypatch, tmp_path, "http://user:secret@127.0.0.1:9")
    assert check.ok is False
    assert "does not answer" in check.message and "secret" not in check.message


def test_a_refused_host_name_gets_the_flag_that_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(403, "Invalid Host header - possible DNS rebinding attack detected") as (url, _):
        check = mlflow(monkeypatch, tmp_path, url)
    assert check.ok is False and f"--allowed-hosts {url.removeprefix('http://')}" in check.message


def test_credentials_are_sent_and_a_refusal_names_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(401, "who are you") as (url, seen):
        check = mlflow(monkeypatch, tmp_path, url)
        assert check.ok is False and "MLFLOW_TRACKING_USERNAME" in check.message
        mlflow(monkeypatch, tmp_path, url.replace("http://", "http://me:p%40ss@"))
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
        mlflow(monkeypatch, tmp_path, url)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss")
        mlflow(monkeypatch, tmp_path, url)
    basic = "Basic bWU6cEBzcw=="
    assert [headers.get("Authorization") for headers in seen] == [None, basic, "Bearer abc", basic]


def test_something_that_is_no_mlflow_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(404, "nothing here") as (url, _):
        check = mlflow(monkeypatch, tmp_path, url)
    assert check.ok is False and "status 404" in check.message


def test_a_clock_that_differs_from_the_servers_is_noticed() -> None:
    with server(200, "OK", date="Mon, 01 Jan 2024 00:00:00 GMT") as (url, _):
        check = doctor.check_clock(url)
    assert check.ok is False and "from the MLflow server's" in check.message
    with server(200, "OK") as (url, _):
        assert doctor.check_clock(url).ok is None
    assert doctor.check_clock("sqlite:///x.db").ok is True
