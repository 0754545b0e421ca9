"""What a user does with a store, the same on a folder and on an object store, and from another machine as well."""

import json
import signal
from pathlib import Path

import pytest
from object_store_server import new_bucket
from stores import Machine
from submitting import statuses, wait_until

from ropewalk.infra.store import Store

PIPELINE = str(Path(__file__).parents[1] / "toy_pipeline.py")
RUN = ("run", PIPELINE, "--executor", "local")
ROUNDS = (*RUN, "--param", "kind=rounds")


@pytest.fixture(scope="module")
def machines(kind_of_store, tmp_path_factory):
    """Two machines that share a store, and the result of the diamond that the first one ran."""
    home = tmp_path_factory.mktemp("machines")
    uri = str(home / "store") if kind_of_store == "folder" else f"{new_bucket()}/a prefix"
    first, second = Machine(uri, home / "first"), Machine(uri, home / "second")
    return first, second, first.told(*RUN)


@pytest.fixture
def pair(kind_of_store, tmp_path, monkeypatch):
    """Two machines that share a new store, and a gate at which a step of rounds waits."""
    uri = str(tmp_path / "store") if kind_of_store == "folder" else new_bucket()
    gate = tmp_path / "gate"
    gate.touch()
    # What this process itself looks at is on a third machine.
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "third"))
    first, second = (Machine(uri, tmp_path / name, {"GATE": str(gate)}) for name in ("first", "second"))
    yield first, second, gate
    gate.unlink(missing_ok=True)


def digests(result):
    return [step["output"]["digest"] for step in result["steps"]]


def events(store, run_id):
    store.pull_runs(at_once=True)
    path = store.root / "runs" / run_id / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_at_the_gate(store):
    """The id of the run whose step has come to the gate, once the store has what the step remembers."""

    def remembered():
        if store.is_local:
            return [path for path in store.root.glob("work/*/*/round") if path.read_text() == "3"]
        indexes = [name for name in store.objects.sizes("work") if name.endswith("index.json")]
        found = [json.loads(store.objects.read(f"work/{name}")).get("round") for name in indexes]
        return [entry for entry in found if entry and store.objects.read(entry["object"]) == b"3"]

    wait_until(remembered, "what the step remembers")
    store.pull_runs(at_once=True)
    return max(path.parent.name for path in (store.root / "runs").glob("*/run.json"))


def test_what_one_machine_has_run_is_fresh_on_another(machines):
    first, second, result = machines
    assert result["status"] == "succeeded" and set(statuses(result).values()) == {"ran"}
    assert all(step["output"]["uri"].startswith(first.store_uri) for step in result["steps"])
    planned = second.told("plan", PIPELINE, "--exit-code")
    assert {step["status"] for step in planned["steps"]} == {"reuse"}
    again = second.told(*RUN)
    assert set(statuses(again).values()) == {"reused"} and digests(again) == digests(result)
    changed = second.told("plan", PIPELINE, "--exit-code", "--param", "value=4", code=2)["steps"]
    assert [(step["name"], step["status"]) for step in changed[:2]] == [("first", "run"), ("left", "may-run")]
    assert changed[0]["reason"] == "config value 3 -> 4"
    told = second.told("explain", PIPELINE, "first", "--param", "value=4")
    assert told["changes"] == ["config value 3 -> 4"]


def test_runs_are_listed_and_shown_on_another_machine(machines):
    _, second, result = machines
    run_id = result["run_id"]
    (row,) = [row for row in second.told("status")["runs"] if row["run_id"] == run_id]
    assert (row["pipeline"], row["status"], row["steps"]) == ("diamond", "succeeded", {"ran": 4})
    shown = second.told("show", run_id)
    assert digests(shown) == digests(result)
    first_step = second.told("show", run_id, "first")
    assert first_step["config"]["value"] == 3 and first_step["metrics"] == {"value": 3}
    logs = second.told("logs", run_id)["logs"]
    assert {log["step"] for log in logs} == {"first", "left", "right", "last"}


def test_an_unknown_run_and_a_path_for_a_run_are_refused_in_one_sentence(machines):
    _, second, _ = machines
    commands = {"show": "20200101-000000-abcd", "logs": "../../objects", "cancel": "a/b", "rerun": ".."}
    for command, run_id in commands.items():
        error = second.told(command, run_id, code=1)["error"]
        assert f"no run is called {run_id!r}" in error and "\n" not in error
    error = second.told(*RUN, "--run-id", "../evil", code=1)["error"]
    assert "--run-id ../evil" in error


def test_mlflow_is_brought_up_to_date_from_another_machine(machines):
    _, second, result = machines
    synced = second.told("sync", result["run_id"])
    assert synced["run_id"] == result["run_id"] and synced["mlflow_run_id"]


def test_a_step_that_is_forced_gets_the_next_number_and_the_same_digest(machines):
    first, second, result = machines
    key = result["steps"][2]["key"]
    numbers = Store(first.store_uri).numbers(key)
    forced = second.told(*RUN, "--force", "right")
    assert statuses(forced) == {"first": "reused", "left": "reused", "right": "ran", "last": "reused"}
    rerun = first.told("rerun", result["run_id"], "right", "--executor", "local")
    assert statuses(rerun)["right"] == "ran" and digests(rerun) == digests(forced) == digests(result)
    assert Store(first.store_uri).numbers(key) == [*numbers, numbers[-1] + 1, numbers[-1] + 2]


def test_logs_are_followed_from_another_machine_to_the_end_of_the_run(pair):
    first, second, gate = pair
    with first.start(*ROUNDS) as driver:
        run_id = run_at_the_gate(Store(first.store_uri))
        with second.start("logs", run_id, "-f") as following:
            lines = []
            while not lines or lines[-1] != "round 3\n":
                lines.append(following.stdout.readline())
                assert lines[-1], "it ended before the run"
            gate.unlink()
            rest = following.stdout.read()
            assert following.wait() == 0
        assert driver.wait(timeout=60) == 0
    assert lines == ["==> rounds, attempt 1 <==\n", "begins after round 0\n", *(f"round {n}\n" for n in (1, 2, 3))]
    assert rest == "round 4\nround 5\nround 6\n"


def test_a_run_is_cancelled_from_another_machine_and_goes_on_there(pair):
    first, second, gate = pair
    store = Store(first.store_uri)
    with first.start(*ROUNDS) as driver:
        run_id = run_at_the_gate(store)
        # As on another host, where the driver is out of reach of signals.
        store.objects.write(f"runs/{run_id}/cancel", b'{"now": false}')
        assert driver.wait(timeout=60) == 130
    assert second.told("status")["runs"][0]["status"] == "cancelled"
    (key,) = store.known_keys()
    assert store.numbers(key) == [], "no commit"
    assert "there is nothing to cancel" in second.told("cancel", run_id, code=1)["error"]
    gate.unlink()
    result = second.told("rerun", run_id, "--executor", "local")
    assert statuses(result) == {"rounds": "ran"}
    assert begun_after(store, key) == 3
    assert store.objects.names(f"work/{key}") == []


def begun_after(store, key):
    """After which round the attempt that was committed began."""
    commit = store.latest(key)[0]
    return json.loads(store.objects.read(f"objects/{key}/attempts/{commit.attempt.name}/observed/begun.json"))


def test_a_machine_that_is_lost_is_replaced_by_another_that_goes_on_from_what_it_left(pair):
    first, second, gate = pair
    store = Store(first.store_uri)
    with first.start(*ROUNDS) as driver:
        run_at_the_gate(store)
        driver.send_signal(signal.SIGKILL)
    assert second.told("status")["runs"][0]["status"] == "killed"
    gate.unlink()
    result = second.told(*ROUNDS)
    (key,) = store.known_keys()
    assert statuses(result) == {"rounds": "ran"} and begun_after(store, key) == 3
    assert store.numbers(key) == [0] and "goes on" not in result["steps"][0]["reason"]


def test_a_second_driver_waits_fails_or_skips_and_takes_the_output_of_the_first(pair):
    first, second, gate = pair
    store = Store(first.store_uri)
    with first.start(*ROUNDS) as driver:
        run_at_the_gate(store)
        (row,) = second.told("status")["runs"]
        assert (row["status"], row["running"]) == ("running", ["rounds"])
        (planned,) = second.told("plan", PIPELINE, "--param", "kind=rounds")["steps"]
        assert planned["status"] == "run" and f"held by run {row['run_id']}" in planned["reason"]
        failed = second.told(*ROUNDS, "--on-locked", "fail", code=1)
        assert "locked by run" in failed["steps"][0]["reason"] and statuses(failed) == {"rounds": "failed"}
        assert statuses(second.told(*ROUNDS, "--on-locked", "skip", code=None)) == {"rounds": "skipped"}
        with second.start(*ROUNDS, "--json") as waiting:
            wait_until(lambda: is_waiting(store), "the second driver to wait")
            gate.unlink()
            told = json.loads(waiting.stdout.read().splitlines()[-1])
            assert waiting.wait() == 0
        assert driver.wait(timeout=60) == 0
    assert statuses(told) == {"rounds": "reused"} and row["run_id"] in told["steps"][0]["reason"]
    (key,) = store.known_keys()
    assert store.numbers(key) == [0] and len(store.objects.names(f"objects/{key}/attempts")) == 1


def is_waiting(store):
    store.pull_runs(at_once=True)
    newest = max(path.parent.name for path in (store.root / "runs").glob("*/run.json"))
    return "step_waiting" in [event["type"] for event in events(store, newest)]


def test_adopted_data_is_used_by_a_step_on_another_machine_under_its_name(pair, tmp_path):
    first, second, _ = pair
    books = tmp_path / "books"
    books.mkdir()
    (books / "one.txt").write_text("1")
    (books / "notes.md").write_text("n")
    adopt = ("adopt", str(books), "--name", "books", "--include", "*.txt")
    told = first.told(*adopt, "--copy")
    assert told | {"digest": ""} == {
        "name": "books",
        "number": 0,
        "kind": "copy",
        "source": str(books),
        "digest": "",
        "uri": "adopted://books",
        "num_files": 1,
        "num_bytes": 1,
    }
    assert first.told(*adopt, "--copy")["number"] == 0, "the same data is the same version"
    (books / "one.txt").unlink()
    assert "no file in" in first.told(*adopt, code=1)["error"]
    result = second.told(*RUN, "--param", "kind=books")
    assert statuses(result) == {"list": "ran"}
    commit = Store(first.store_uri).latest(result["steps"][0]["key"])[0]
    name = f"objects/{commit.key}/attempts/{commit.attempt.name}/data/value.json"
    assert Store(first.store_uri).objects.read(name) == b"['one.txt']"
    error = second.told("adopt", str(books), "--name", "../books", code=1)["error"]
    assert "--name ../books" in error
