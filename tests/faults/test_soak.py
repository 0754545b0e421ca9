"""A short soak with a seed of its own; `make soak MINUTES=...` runs a long one."""

import json
import time

import pytest
from faults import invariants
from faults.soak import Round, soak
from faults.unreliable_server import sometimes, unreliable_server
from object_store_server import new_bucket

from ropewalk.infra.store import Store

SEED = 20_26


@pytest.mark.faults
def test_a_short_soak_breaks_no_invariant(capsys):
    failed = soak(0.6, SEED, store=None, round_seconds=15.0, num_drivers=3)
    assert failed == 0, capsys.readouterr().out


@pytest.mark.faults
def test_a_short_soak_on_an_unreliable_object_store_breaks_no_invariant(capsys):
    with unreliable_server(sometimes(0.01)):
        failed = soak(0.4, SEED, store=new_bucket(), round_seconds=18.0, num_drivers=2)
    assert failed == 0, capsys.readouterr().out


@pytest.fixture
def calm(tmp_path):
    """A finished round that nobody disturbed."""
    this = Round(SEED, tmp_path / "round", str(tmp_path / "round" / "store"), 0.0)
    assert this.play() == []
    return this


def test_the_checker_sees_a_second_commit_a_torn_record_and_a_changed_file(calm):
    store = Store(calm.store_uri)
    commit = store.commits()[0]
    assert list(invariants.broken_commits(store)) == []
    path = store.root / "objects" / commit.key / "commits" / "000000.json"
    path.with_name("000001.json").write_bytes(path.read_bytes())
    assert "2 commits were made, 1 are accounted for" in next(iter(invariants.broken_commits(store)))
    assert list(invariants.broken_commits(store, {commit.key: 1})) == []
    path.with_name("000001.json").rename(path.with_name("000002.json"))
    assert "numbered [0, 2]" in next(iter(invariants.broken_commits(store)))
    path.with_name("000002.json").unlink()
    withdrawn = store.root / "objects" / commit.key / "withdrawn" / "000000.test.json"
    withdrawn.parent.mkdir()
    withdrawn.write_text('{"reason": "for a test"}')
    assert list(invariants.broken_commits(store)) == []
    withdrawn.unlink()
    changed = next(iter(commit.attempt.data.iterdir()))
    changed.write_bytes(b"x" * changed.stat().st_size)
    assert "content changed" in next(iter(invariants.broken_commits(store)))
    assert list(invariants.broken_commits(store, unsound={commit.key})) == []
    events = next((store.root / "runs").glob("*/events.jsonl"))
    assert list(invariants.broken_records(store)) == []
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join([lines[0], *lines[2:]]))
    assert "has seq 2" in next(iter(invariants.broken_records(store)))


def test_the_checker_sees_leases_out_of_order_and_work_after_the_commit(calm, tmp_path):
    store = Store(calm.store_uri)
    commit = store.commits()[0]
    assert list(invariants.broken_leases(store, drivers_ended=True)) == []
    assert list(invariants.repeated_work(store, calm.journal, excused=())) == []
    with calm.journal.open("a") as file:
        began = commit.record["committed_at"] + 60
        file.write(f'{{"what": "began", "time": {began}, "key": "{commit.key}", "attempt": "late"}}\n')
    assert "60.0 s after the commit" in next(iter(invariants.repeated_work(store, calm.journal, excused=())))
    lease = store.root / "objects" / commit.key / "leases" / "000000.json"
    lease.with_name("000001.json").write_bytes(lease.read_bytes())
    assert "one attempt holds two generations" in next(iter(invariants.broken_leases(store, drivers_ended=False)))
    lease.rename(lease.with_name("000002.json"))
    assert "lease generations [1, 2]" in next(iter(invariants.broken_leases(store, drivers_ended=False)))


def test_the_checker_sees_parts_that_were_lost_and_commits_that_were_replaced(calm):
    store = Store(calm.store_uri)
    commit = store.commits()[0]
    assert list(invariants.lost_work(calm.journal, excused=())) == []
    assert list(invariants.lost_commits(store, excused=())) == []
    facts = {"key": commit.key, "attempt": "late", "time": time.time()}
    with calm.journal.open("a") as file:
        file.write(json.dumps({**facts, "what": "began", "found": []}) + "\n")
    (told,) = invariants.lost_work(calm.journal, excused=())
    assert "did not find the parts [0" in told
    assert list(invariants.lost_work(calm.journal, excused={commit.key})) == []
    path = store.root / "objects" / commit.key / "commits" / "000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attempt": "other"}))
    assert "is gone" in next(iter(invariants.lost_commits(store, excused=())))
