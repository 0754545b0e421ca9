"""The doctor sees what would spoil a run, says what to do, and is quick about it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from object_store_server import new_bucket, object_store_server

from ropewalk.infra.doctor import machine, services
from ropewalk.infra.doctor.report import Check, diagnose
from ropewalk.infra.store import Store


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
    return services.check_mlflow(tmp_path)


def test_this_machine_can_be_diagnosed(tmp_path: Path) -> None:
    checks = diagnose(str(tmp_path / "store"))
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
        "training",
        "gpu",
    ]
    assert all(check.message for check in checks)
    assert {check.name: check.ok for check in checks}["store"] is True
    assert list((tmp_path / "store").iterdir()) == []


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from ropewalk.infra.doctor.report import diagnose; diagnose(sys.argv[1]);"
        "print({'torch', 'transformers', 'ray', 'mlflow', 'datasets', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("transformers", "no-such-distribution"))
    assert machine.check_packages() == Check(
        "packages", False, "missing: no-such-distribution; pip install -e . installs them"
    )


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MIN_TRANSFORMERS", (99, 0))
    check = machine.check_packages()
    assert check.ok is False and "99.0 is needed" in check.message


def test_a_regular_package_called_kernels_is_found_and_a_plain_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernels").mkdir()
    assert machine.check_import_names().ok
    (tmp_path / "kernels" / "__init__.py").touch()
    check = machine.check_import_names()
    assert check.ok is False and str(tmp_path / "kernels" / "__init__.py") in check.message


def test_a_store_that_is_no_folder_is_refused_and_told_once(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    for uri in (str(tmp_path / "store"), "ftp://host/store"):
        (wrong,) = (check for check in diagnose(uri) if check.ok is False)
        assert wrong.name == "store" and f"--store {uri}" in wrong.message


def test_a_store_that_cannot_be_written_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    check = services.check_store(str(tmp_path / "file" / "store"))
    assert check.ok is False and "Not a directory; give --store a folder" in check.message


def test_a_store_without_exclusive_creation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr("os.link", overwrite)
    check = services.check_store(str(tmp_path))
    assert check.ok is False and "created twice" in check.message
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_is_tried_and_nothing_is_left_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store_server() as endpoint:
        bucket = new_bucket()
        assert services.check_store(f"{bucket}/store").ok is True
        assert Store(f"{bucket}/store").objects.sizes("") == {}
        missing = services.check_store("s3://no-such-bucket-of-mine/store")
        assert missing.ok is False and "there is no such bucket" in missing.message
        assert "AWS_ACCESS_KEY_ID" in missing.message
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    gone = services.check_store(f"{bucket}/store")
    assert gone.ok is False and f"nothing answers at {endpoint}" in gone.message


def test_a_cluster_that_does_not_answer_is_one_sentence() -> None:
    check = services.check_cluster("http://127.0.0.1:9")
    assert check.ok is False and "no Ray dashboard answers at http://127.0.0.1:9" in check.message
    assert services.check_cluster("auto").ok is False


def test_packages_that_do_not_import_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE", "raise ImportError('libcudart.so: cannot open')")
    (check,) = machine.check_training()
    assert check.ok is False and "ImportError: libcudart.so: cannot open" in check.message


@pytest.mark.parametrize(
    ("gpus", "cuda", "driver", "ok", "message"),
    [
        ([], None, [], None, "everything runs on the processors"),
        (["H100"], "12.8", ["H100"], True, "H100; CUDA 12.8"),
        ([], None, ["H100"], False, "the driver knows H100, but torch 2.13 is a CPU build: install one for CUDA"),
        ([], "12.8", ["H100"], False, "sees none: look at CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_of_the_driver_must_be_seen_by_torch(
    monkeypatch: pytest.MonkeyPatch, gpus: list, cuda: str, driver: list, ok: bool | None, message: str
) -> None:
    found = {"torch": "2.13", "deepspeed": "0.19", "cuda": cuda, "gpus": gpus}
    monkeypatch.setattr(machine, "PROBE", f"print({json.dumps(json.dumps(found))})")
    monkeypatch.setattr(machine, "driver_gpus", lambda: driver)
    check = machine.check_training()[1]
    assert check.ok is ok and message in check.message


def test_little_disk_or_shared_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MIN_FREE_GIB", 1e9)
    monkeypatch.setattr(machine, "MIN_SHM_GIB", 1e9)
    assert machine.check_disk(tmp_path / "not" / "there").ok is False
    check = machine.check_shared_memory(tmp_path)
    assert check.ok is False and "--shm-size" in check.message
    assert machine.check_shared_memory(tmp_path / "missing").ok is None


def test_ray_tokens_and_mode_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.check_ray_authentication() == Check("ray authentication", True, "off")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check = services.check_ray_authentication()
    assert check.ok is False and "ray get-auth-token --generate" in check.message
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("t")
    assert services.check_ray_authentication().ok is True
    monkeypatch.delenv("RAY_AUTH_MODE")
    check = services.check_ray_authentication()
    assert check.ok is None and "export RAY_AUTH_MODE=token" in check.message
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    assert services.check_ray_authentication().ok is False


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
        check = services.check_clock(url)
    assert check.ok is False and "from the MLflow server's" in check.message
    with server(200, "OK") as (url, _):
        assert services.check_clock(url).ok is None
    assert services.check_clock("sqlite:///x.db").ok is True
