"""A cluster that demands a token: every combination of what the submitter has set."""

import pytest
from ray_cluster import two_nodes
from submitting import Submitter, statuses

pytestmark = pytest.mark.slow
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auth")
    with two_nodes(TOKEN) as cluster:
        yield Submitter.at(folder / "user", cluster)


def refused(user, **variables):
    """The one sentence that the command refuses with."""
    user.cluster.environment.pop("RAY_AUTH_TOKEN", None)
    done = user.command(*user.arguments(), code=1, **variables)
    [line] = done.stderr.strip().splitlines()
    assert TOKEN not in done.stderr + done.stdout
    assert not (user.folder / "store/runs").exists(), "nothing is recorded of a run that was refused"
    return line


def test_without_a_mode_it_says_which_variable_to_set(user):
    line = refused(user, RAY_AUTH_MODE="disabled")
    assert "demands a token: set RAY_AUTH_MODE=token" in line and "RAY_AUTH_TOKEN" in line


def test_with_another_token_it_says_where_the_token_is_looked_for(user):
    line = refused(user, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another" * 8)
    assert "refuses the token" in line and "RAY_AUTH_TOKEN_PATH" in line and "anotheranother" not in line


def test_without_any_token_it_says_so(user):
    line = refused(user, RAY_AUTH_MODE="token")
    assert "RAY_AUTH_MODE=token, but there is no token" in line


@pytest.mark.parametrize("place", ["variable", "file"])
def test_with_its_token_a_run_goes_through_and_the_token_is_recorded_nowhere(user, tmp_path, place):
    (tmp_path / "token").write_text(TOKEN)
    given = {"RAY_AUTH_TOKEN": TOKEN} if place == "variable" else {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    result = user.submit(RAY_AUTH_MODE="token", **given)
    assert set(statuses(result).values()) <= {"ran", "reused"}
    user.command("logs", result["run_id"], "--driver", RAY_AUTH_MODE="token", **given)
    for path in (user.folder / "store").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
