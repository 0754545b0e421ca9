"""An object store that refuses, is not there or does not answer: one sentence that says what is wrong, soon enough."""

import os
import resource
import socket
import time
import urllib.request

import pytest
from engine import run
from object_store_server import ENVIRONMENT, new_bucket, object_store_server
from toy_stages import diamond

from ropewalk.infra.failures import classify
from ropewalk.infra.record import RunRecord
from ropewalk.infra.remote import object_store
from ropewalk.infra.remote.object_store import open_objects
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store

NO_LIMIT = 1 << 62


@pytest.fixture(scope="module")
def server():
    with object_store_server() as endpoint:
        yield endpoint


@pytest.fixture
def uri(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    return new_bucket()


@pytest.fixture
def permissions(server):
    """The server lets in those whom it knows, and it knows nobody."""

    def requests_without_check(number):
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{server}/moto-api/reset-auth", str(number).encode(), headers)
        urllib.request.urlopen(request).close()

    requests_without_check(0)
    yield
    requests_without_check(NO_LIMIT)


def sentence(call):
    """The one line that an error says."""
    with pytest.raises((OSError, UserError)) as raised:
        call()
    text = str(raised.value)
    assert len(text.splitlines()) == 1 and not any(secret in text for secret in secrets())
    return text


def secrets():
    return {ENVIRONMENT["AWS_ACCESS_KEY_ID"], ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]}


def calls(store):
    """One of each kind."""
    objects = store.objects
    return {
        "read": lambda: objects.read("x"),
        "write": lambda: objects.write("x", b"1"),
        "create": lambda: objects.create("x", b"1"),
        "names": lambda: objects.names("x"),
        "sizes": lambda: objects.sizes("x"),
        "remove": lambda: objects.remove("x"),
        "run": lambda: run(diamond(), store.uri),
    }


@pytest.mark.parametrize("call", ["read", "write", "create", "names", "sizes", "remove", "run"])
def test_who_has_no_permission_is_told_so_with_the_stores_own_word(uri, permissions, call):
    told = sentence(calls(Store(uri))[call])
    assert told.startswith(uri) and "credentials of this machine do not allow it (InvalidAccessKeyId)" in told


@pytest.mark.parametrize("call", ["write", "create", "names", "sizes", "remove", "run"])
def test_a_bucket_that_is_not_there_is_named(server, tmp_path, monkeypatch, call):
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path))
    told = sentence(calls(Store("s3://no-such-bucket-here/prefix"))[call])
    assert told == "s3://no-such-bucket-here: there is no such bucket"


@pytest.fixture
def impatient(monkeypatch):
    """Time limits for tests."""
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1)
    monkeypatch.setattr(object_store, "ANSWER_SECONDS", 1)
    open_objects.cache_clear()
    yield
    open_objects.cache_clear()


@pytest.mark.parametrize("answer", ["refused", "silence"])
def test_without_credentials_it_is_said_which_variables_have_them(uri, impatient, monkeypatch, answer):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if answer == "refused":
            listener.close()
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
        else:
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        told = sentence(lambda: Store(uri).objects.names("x"))
    assert "there are no credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in told


@pytest.mark.parametrize("answer", ["refused", "silence"])
def test_a_store_that_does_not_answer_is_given_up_and_counts_as_the_machines_fault(uri, impatient, monkeypatch, answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        if answer == "refused":
            listener.close()
        for name in ("read", "write", "create", "names"):
            began = time.monotonic()
            with pytest.raises(ConnectionError) as raised:
                calls(Store(uri))[name]()
            assert time.monotonic() - began < 30, "not for ever"
            assert classify(raised.value) == "infrastructure" and uri in str(raised.value)


def test_an_endpoint_without_encryption_is_used_where_any_of_its_variables_names_it(uri, server, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    open_objects.cache_clear()
    objects = Store(uri).objects
    assert objects.create("x", b"1") and objects.read("x") == b"1"


def test_a_download_for_which_there_is_no_room_names_the_file(uri, tmp_path, monkeypatch):
    commit = run(diamond(), uri).steps[0].commit
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "elsewhere"))
    there = Store(uri)
    there.read_commit(commit.key, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        told = sentence(lambda: there.fetch(commit.uri))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "value.json" in told and str(there.root) in told
    assert [path.name for path in there.root.rglob("*value.json*")] == [], "nothing is left of it"
    assert (there.fetch(commit.uri) / "value.json").read_text() == "3"


def test_a_scratch_folder_that_cannot_be_written_is_named(uri, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "file"))
    assert str(tmp_path / "file") in sentence(lambda: RunRecord(Store(uri), "p"))


@pytest.mark.parametrize(
    "uri", ["s3://name:s3cr3t@bucket/x", "s3://bucket/x?secret=s3cr3t", "https://name:s3cr3t@host/x", "s3:/n:s3cr3t@b"]
)
def test_secrets_in_the_uri_of_a_store_are_refused_and_not_repeated(uri):
    told = sentence(lambda: Store(uri))
    assert "s3cr3t" not in told


def test_no_credential_of_the_environment_is_in_what_a_run_leaves(uri, tmp_path):
    result = run(diamond(), uri)
    store = Store(uri)
    kept = [store.objects.read(name) for name in store.objects.sizes("")]
    kept += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert result.status == "succeeded" and len(kept) > 20
    for secret in secrets():
        assert secret in os.environ.values()
        assert not any(secret.encode() in content for content in kept)
