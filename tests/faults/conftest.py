"""Stores of both kinds for the tests of this folder."""

import pytest
from object_store_server import new_bucket, object_store_server


@pytest.fixture(scope="module", params=["folder", "object store"])
def kind_of_store(request):
    if request.param == "folder":
        yield request.param
    else:
        with object_store_server():
            yield request.param


@pytest.fixture
def store_uri(kind_of_store, tmp_path, monkeypatch):
    """A new store: a folder, or a bucket of a real S3 server; this process has a scratch folder of its own."""
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    return str(tmp_path / "store") if kind_of_store == "folder" else new_bucket()


@pytest.fixture
def elsewhere(tmp_path):
    """Environment of a process on another machine, as far as an object store is concerned."""
    return {"ROPEWALK_SCRATCH": str(tmp_path / "elsewhere")}
