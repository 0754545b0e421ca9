"""A command that waits for its store says so."""

import socket

import pytest

from ropewalk.pipelines.open_store import open_store


@pytest.fixture
def address(monkeypatch):
    """A server that listens, named in the environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:secret@127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_an_address_where_nobody_listens_is_told_at_once_without_its_password(address, capsys):
    address.close()
    open_store("s3://bucket/prefix")
    told = capsys.readouterr().err
    assert "Connection refused" in told and "change AWS_ENDPOINT_URL; trying for a minute" in told
    assert "secret" not in told


def test_nothing_is_said_where_somebody_listens_or_the_store_is_a_folder(address, capsys, tmp_path):
    open_store("s3://bucket/other")
    address.close()
    open_store(str(tmp_path))
    assert capsys.readouterr().err == ""
