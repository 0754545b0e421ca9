import pytest


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """Where the toy stages leave a line for each execution; see `toy_stages.executions`."""
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
