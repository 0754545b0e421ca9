import pytest
from run_records import store_with_database, write_quickstart_run
from stores import elsewhere, kind_of_store, store_uri

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking

__all__ = ["elsewhere", "kind_of_store", "store_uri"]


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """Where the toy stages leave a line for each execution; see `toy_stages.executions`."""
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))


@pytest.fixture
def no_server(monkeypatch):
    """MLflow is the sqlite database beside the store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def store(tmp_path):
    """A store's folder with a fresh MLflow database."""
    return store_with_database(tmp_path / "store")


@pytest.fixture(scope="module")
def shown_store(tmp_path_factory):
    """A store with one finished run, `run-1`, in MLflow. Tests add runs but leave this one alone."""
    root = store_with_database(tmp_path_factory.mktemp("shown"))
    write_quickstart_run(root, "run-1")
    tracking.sync(Store(root), "run-1", tracking_uri=f"sqlite:///{root}/mlflow.db")
    return root
