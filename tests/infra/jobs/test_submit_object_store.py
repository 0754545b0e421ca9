"""A run on a real cluster of two nodes whose store is a real S3 server; nobody shares a folder with anybody."""

import json
import os
from dataclasses import replace

import pytest
from object_store_server import ENVIRONMENT, new_bucket, object_store_server
from ray_cluster import two_nodes
from submitting import Submitter, digests, last_json, statuses, wait_until

from ropewalk.infra.store import Store

pytestmark = pytest.mark.slow
PASSED_ON = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Somebody with credentials, and a cluster that has none but those that are passed on."""
    home = tmp_path_factory.mktemp("submit")
    with two_nodes() as cluster, object_store_server():
        scratch = {"ROPEWALK_SCRATCH": str(home / "scratch")}
        mine = replace(cluster, environment={**cluster.environment, **aws(), **scratch})
        yield Submitter.at(home / "user", mine)


def aws():
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.fixture(scope="module")
def uri(user):
    return f"{new_bucket()}/team"


@pytest.fixture
def store(uri, tmp_path, monkeypatch):
    """The store as this process sees it, from a scratch folder of its own."""
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    return Store(uri)


def options(uri, *more):
    return ["--store", uri, *(word for name in PASSED_ON for word in ("--env", name)), *more]


@pytest.fixture(scope="module")
def result(user, uri):
    return user.submit(*options(uri))


def test_a_submitted_run_commits_to_the_object_store_and_is_reused_and_shown_from_outside(result, user, store):
    assert result["status"] == "succeeded" and statuses(result) == {"first": "ran", "second": "ran"}
    second = store.latest(result["steps"][1]["key"])[0]
    assert json.loads((store.fetch(second.uri) / "value.json").read_text()) == 15
    again = user.submit(*options(store.uri))
    assert set(statuses(again).values()) == {"reused"} and digests(again) == digests(result)
    _, row = last_json(user.command("status", "--store", store.uri, "--json").stdout)["runs"]
    assert (row["run_id"], row["status"]) == (result["run_id"], "succeeded")
    shown = last_json(user.command("show", result["run_id"], "second", "--store", store.uri, "--json").stdout)
    assert store.objects.names(shown["log"].removeprefix(f"{store.uri}/")) != []


def test_no_credential_is_in_the_store_or_in_what_the_commands_print(result, user, store):
    printed = user.command("logs", result["run_id"], "--driver", "--store", store.uri).stdout
    printed += user.command("show", result["run_id"], "--store", store.uri, "--json").stdout
    everything = {name: store.objects.read(name) for name in store.objects.sizes("")}
    assert f"runs/{result['run_id']}/job.json" in everything
    for secret in (ENVIRONMENT["AWS_ACCESS_KEY_ID"], ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in printed
        assert [name for name, content in everything.items() if secret.encode() in content] == []


def test_a_step_on_another_node_is_followed_from_outside_and_its_run_cancelled(result, user, store, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    more = ["--force", "second", "--env", f"GATE={gate}", "--env", "GREETING=followed", "--no-wait"]
    run_id = user.submit(*options(store.uri, *more))["run_id"]
    with user.started("logs", run_id, "second", "--follow", "--store", store.uri) as following:
        assert following.stdout.readline() == "==> second, attempt 1 <==\n"
        assert following.stdout.readline() == "greeting: followed\n"
        user.command("cancel", run_id, "--store", store.uri)
        assert following.wait(timeout=90) == 0, "it ends with the run"

    def cancelled():
        rows = last_json(user.command("status", "--store", store.uri, "--json").stdout)["runs"]
        return [row["status"] for row in rows if row["run_id"] == run_id] == ["cancelled"]

    wait_until(cancelled, "the run to be cancelled")
    key = result["steps"][1]["key"]
    assert store.numbers(key) == [0], "no second commit"
