"""`verify --repair` lets what is damaged be made again, and nothing else; until then it is not used."""

import json
import threading
from dataclasses import replace

import pytest
from engine import run, statuses
from faults.soak import damage
from toy_stages import diamond, executions

from ropewalk.infra.lease import Holder, acquire
from ropewalk.infra.plan import Planner
from ropewalk.infra.store import Store
from ropewalk.infra.upkeep.verify import verify
from ropewalk.pipelines.cli import main


@pytest.fixture
def counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete file", "delete manifest", "empty commit"])
def test_only_what_is_damaged_is_made_again(counted, store_uri, monkeypatch, kind):
    undisturbed = run(diamond(), store_uri)
    commit = next(step.commit for step in undisturbed.steps if step.name == "right")
    # A machine that keeps nothing of an object store.
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(counted / "another"))
    store = Store(store_uri)
    name = damage(store, commit.key, commit.attempt.name, commit.number, kind)
    verdicts = verify(store, store.known_keys(), deep=True, repair=True)
    assert {verdict.key: verdict.status for verdict in verdicts if verdict.status != "SOUND"} == {commit.key: "CORRUPT"}
    (problem,) = next(verdict.problems for verdict in verdicts if verdict.status == "CORRUPT")
    assert name in problem
    (counted / "executions").write_text("")
    again = run(diamond(), store_uri)
    assert statuses(again) == {"first": "reused", "left": "reused", "right": "ran", "last": "reused"}
    assert executions(counted) == ["total"]
    assert [step.commit.digest for step in again.steps] == [step.commit.digest for step in undisturbed.steps]
    repaired = again.steps[2].commit
    assert repaired.number == 1 and store.problems(repaired, deep=True) == []
    statuses_now = {(v.key, v.number): v.status for v in verify(store, store.known_keys(), deep=True, repair=False)}
    assert statuses_now.pop((commit.key, 0)) in ("WITHDRAWN", "CORRUPT")
    assert set(statuses_now.values()) == {"SOUND"}


@pytest.mark.timeout(60)
def test_an_output_that_is_withdrawn_while_a_run_waits_for_it_is_made_anew(store_uri):
    store = Store(store_uri)
    key = Planner(diamond(), store).plan()[0].key
    held = acquire(store.objects, key, replace(Holder.here("other", "other-run"), machine="another"))

    def commit_and_withdraw():
        attempt = store.begin(key, "other")
        (attempt.data / "value.json").write_text("3")
        # Withdrawn first, so that the run that waits cannot see it in between.
        store.withdraw(key, 0, "test", "it was damaged")
        store.commit(attempt, {"run_id": "other-run", "code": {}}, number=0)
        held.release()

    timer = threading.Timer(1.0, commit_and_withdraw)
    timer.start()
    result = run(diamond(), store_uri)
    timer.join()
    assert statuses(result)["first"] == "ran"
    assert (result.steps[0].commit.number, store.numbers(key)) == (1, [0, 1])


def test_the_command_names_the_file_and_its_exit_code_tells(tmp_path, capsys, monkeypatch):
    root = tmp_path / "store"
    result = run(diamond(), root)
    commit = result.steps[0].commit
    name = damage(Store(root), commit.key, commit.attempt.name, 0, "flip")

    def command(*words):
        monkeypatch.setattr("sys.argv", ["ropewalk", *words, "--store", str(root), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, json.loads(capsys.readouterr().out.splitlines()[-1])

    code, told = command("verify", "--deep")
    assert code != 0 and name in json.dumps(told)
    code, told = command("verify", "--deep", "--repair")
    assert name in json.dumps(told)
    assert run(diamond(), root).steps[0].status == "ran"
    code, told = command("verify", "--deep")
    assert code == 0, told
