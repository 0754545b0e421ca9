"""Garbage collection removes what nothing uses, and nothing else, whatever happens at the same time."""

import json
import tempfile
import threading
import time
from pathlib import Path

import pytest
from engine import run, statuses
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_stages import diamond, executions

from ropewalk.infra import lease, record
from ropewalk.infra.lease import Holder
from ropewalk.infra.plan import Planner, Selection
from ropewalk.infra.store import Store
from ropewalk.infra.upkeep import garbage
from ropewalk.infra.upkeep.garbage import Policy, collect

DAY = 86400.0


@pytest.fixture
def root(store_uri):
    return store_uri


def twice(store, policy, **options):
    """Mark, then remove after the grace period."""
    collect(store, policy, act=True)
    return collect(store, policy, act=True, clock=lambda: time.time() + 2 * DAY, **options)


def attempts(store):
    names = store.objects.names
    return {attempt for key in names("objects") for attempt in names(f"objects/{key}/attempts")}


def made_by(*results):
    return {step.commit.attempt.name for result in results for step in result.steps}


def test_what_only_older_runs_used_goes_after_the_grace_period_and_not_before(root):
    old, new = run(diamond(3), root), run(diamond(4), root)
    store = Store(root)
    before = attempts(store)
    assert before == made_by(old, new)
    for call in (collect(store, Policy(1), act=False), collect(store, Policy(1), act=True)):
        assert {item.attempt for item in call} == made_by(old) - made_by(new)
        assert {item.state for item in call} == {"found"}
    assert {item.state for item in collect(store, Policy(1), act=True)} == {"waiting"}
    assert attempts(store) == before
    removed = collect(store, Policy(1), act=True, clock=lambda: time.time() + 2 * DAY)
    assert {item.state for item in removed} == {"removed"} and sum(item.num_bytes for item in removed) > 0
    assert attempts(store) == made_by(new)
    assert collect(store, Policy(1), act=True) == []
    assert set(statuses(run(diamond(4), root)).values()) == {"reused"}
    assert set(statuses(run(diamond(3), root)).values()) == {"ran"}


def test_a_pinned_run_keeps_its_outputs_until_it_is_unpinned(root):
    old, new = run(diamond(3), root), run(diamond(4), root)
    store = Store(root)
    garbage.pin(store, old.run_id, pinned=True)
    assert twice(store, Policy(1)) == []
    garbage.pin(store, old.run_id, pinned=False)
    twice(store, Policy(1))
    assert attempts(store) == made_by(new)


def test_a_superseded_output_is_kept_while_a_kept_run_used_it(root):
    first = run(diamond(), root)
    forced = run(diamond(), root, Selection(force=("first", "right")))
    store = Store(root)
    assert twice(store, Policy(2)) == []
    removed = twice(store, Policy(1))
    assert {(item.reason, item.state) for item in removed} == {("superseded", "removed")}
    assert attempts(store) == made_by(forced) and made_by(first) - made_by(forced)


@pytest.mark.parametrize(
    "point", ["before the withdrawal", "before the last look", "after the last look", "before the removal"]
)
@pytest.mark.parametrize("marked_again", [False, True])
def test_an_output_that_is_reused_while_it_is_collected_is_not_lost(root, monkeypatch, point, marked_again):
    """A run comes at some point of the collection: it must use the output, or make it anew, and never lose it.

    Another collector may mark again what the run has just lifted the mark from.
    """
    run(diamond(3), root)
    run(diamond(4), root)
    store, results = Store(root), []

    def come():
        if results:
            return
        results.append(None)
        marks = {name for name in store.objects.sizes("objects") if "/tombstones/" in name}
        contents = {name: store.objects.read(f"objects/{name}") for name in marks}
        results[0] = run(diamond(3), root)
        for name, content in contents.items() if marked_again else ():
            store.objects.write(f"objects/{name}", content)

    collect(store, Policy(1), act=True)
    looked, removal, withdrawal = garbage.find_roots, garbage._remove_from, Store.withdraw
    looks = []

    def look(*arguments):
        looks.append(1)
        if len(looks) == 2 and point == "before the last look":
            come()
        roots = looked(*arguments)
        if len(looks) == 2 and point == "after the last look":
            come()
        return roots

    def remove(*arguments):
        if point == "before the removal":
            come()
        return removal(*arguments)

    def withdraw(*arguments):
        if point == "before the withdrawal":
            come()
        withdrawal(*arguments)

    monkeypatch.setattr(Store, "withdraw", withdraw)
    monkeypatch.setattr(garbage, "find_roots", look)
    monkeypatch.setattr(garbage, "_remove_from", remove)
    collect(store, Policy(1), act=True, clock=lambda: time.time() + 2 * DAY)
    assert results[0].status == "succeeded"
    for step in results[0].steps:
        assert store.problems(step.commit, deep=True) == []
        assert store.latest(step.key)[0] is not None
    assert set(statuses(run(diamond(3), root)).values()) <= {"reused", "ran"}


def test_a_run_that_begins_to_use_an_output_after_the_last_look_is_told_and_makes_it_again(root):
    run(diamond(3), root)
    run(diamond(4), root)
    store = Store(root)
    commit = store.latest(record.previous_step(store, "diamond", "first")["key"])[0]
    assert store.keep(commit)
    store.withdraw(commit.key, commit.number, "somebody", "being removed")
    assert not store.keep(commit)
    assert store.latest(commit.key)[0] is None
    assert store.next_number(commit.key) == 1, "a number is never used twice"
    store.reinstate(commit.key, commit.number, "somebody")
    assert store.latest(commit.key)[0] == commit


def test_attempts_that_were_never_committed_go_unless_somebody_works_on_them(root):
    run(diamond(), root)
    store = Store(root)
    for name in ("dead", "alive"):
        attempt = store.begin(name, f"attempt{name}")
        (attempt.data / "half").write_text("half")
        store.objects.upload({f"objects/{name}/attempts/attempt{name}/data/half": attempt.data / "half"})
        store.objects.write(f"work/{name}/000000/x", b"1")
    held = lease.acquire(store.objects, "alive", Holder.here("attemptalive", "elsewhere"))
    gone = Holder("attemptdead", "r", "far", "another machine", 1, None, 0.0, 60.0)
    store.objects.create("objects/dead/leases/000000.json", json.dumps(vars(gone)).encode())
    try:
        collect(store, Policy(), act=True)
        held._count += 1
        held._write(released=False)
        removed = collect(store, Policy(), act=True, clock=lambda: time.time() + 2 * DAY)
    finally:
        held.release()
    assert {(i.key, i.attempt) for i in removed if i.state == "removed"} == {("dead", "attemptdead"), ("dead", "work")}
    assert store.objects.names("objects/alive/attempts") == ["attemptalive"]
    assert store.objects.names("objects/dead/attempts") == [] and "dead" not in store.objects.names("work")


def test_who_was_silent_for_so_long_that_its_attempt_was_removed_cannot_commit_what_is_left(root):
    store = Store(root)
    key = Planner(diamond(), store).plan()[0].key
    held = lease.acquire(store.objects, key, Holder.here("silent", "run"))
    attempt = store.begin(key, "silent")
    (attempt.data / "half").write_text("half")
    store.objects.upload({f"objects/{key}/attempts/silent/data/half": attempt.data / "half"})
    (item,) = [item for item in twice(store, Policy(0)) if item.attempt == "silent"]
    assert item.state == "removed"
    with pytest.raises(lease.LeaseLostError):
        held.confirm()
    held.release()


def test_scratch_of_a_step_that_failed_in_a_kept_run_stays_for_the_next_try(root):
    result = run(diamond(), root)
    store = Store(root)
    key = result.steps[3].commit.key
    folder = store.root / "runs" / result.run_id
    (folder / "failures").mkdir()
    (folder / "failures" / "last.json").write_text(json.dumps({"key": "failed-key", "error": "x"}))
    for name in ("failed-key", "unknown-key", key):
        store.objects.write(f"work/{name}/000000/state", b"1")
    twice(store, Policy())
    assert store.objects.names("work") == ["failed-key"]


def test_a_run_under_way_keeps_what_it_uses_however_old_it_is(root):
    old = run(diamond(3), root)
    run(diamond(4), root)
    store = Store(root)
    events = store.root / "runs" / old.run_id / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    assert '"run_finished"' in lines[-1]
    events.write_text("".join(lines[:-1]))
    assert twice(store, Policy(1)) == []
    assert garbage.drop_runs(store, Policy(1), act=False) == []
    events.write_text("".join(lines))
    assert garbage.drop_runs(store, Policy(1), act=True) == [old.run_id]
    assert record.run_ids(Store(root)) != [] and old.run_id not in record.run_ids(Store(root))


def test_runs_go_on_beside_a_collector_that_never_rests(root, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    ended, errors, removed = threading.Event(), [], []

    def collector():
        try:
            while not ended.is_set():
                found = collect(Store(root), Policy(1, 0.0), act=True)
                removed.extend(item for item in found if item.state == "removed")
        except Exception as error:  # noqa: BLE001 - of another thread
            errors.append(error)

    thread = threading.Thread(target=collector)
    thread.start()
    try:
        for turn in range(12):
            result = run(diamond(turn % 3), root)
            assert result.status == "succeeded", [(s.name, s.status, s.reason) for s in result.steps]
            for step in result.steps:
                assert Store(root).problems(step.commit, deep=True) == []
    finally:
        ended.set()
        thread.join()
    assert errors == []
    assert removed, "the collector was to remove something"
    assert len(executions(tmp_path)) > 12


# A model of many runs and collectors: each run uses some keys; what a run relies on is there when it ends.
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.sets(st.integers(0, 3), min_size=1), st.booleans()),
        st.tuples(st.just("collect"), st.integers(0, 2), st.sets(st.integers(0, 3))),
        st.tuples(st.just("pin"), st.integers(0, 5), st.booleans()),
    ),
    max_size=10,
)


class Histories:
    """Runs that reuse or make outputs through the same calls as the runner, one small file each."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.runs: list[str] = []
        self.used: dict[str, set[str]] = {}
        self.lost: set[str] = set()
        """Runs that a collection was free to forget."""

    def run(self, keys, force=False):
        run_record = record.RunRecord(self.store, "p", run_id=f"run{len(self.runs):04d}")
        for key in sorted(f"key{number}" for number in keys):
            commit = self.use(run_record, key, force)
            self.used.setdefault(run_record.run_id, set()).add(commit.attempt.name)
            assert self.store.problems(commit, deep=True) == []
        run_record.append({"type": "run_finished", "status": "succeeded"})
        run_record.close()
        self.runs.append(run_record.run_id)

    def use(self, run_record, key, force):
        while True:
            commit, _ = self.store.latest(key)
            if commit is None or force:
                commit = self.make(run_record, key)
                force = False
            document = {"key": key, "run_id": run_record.run_id, "uri": commit.uri}
            run_record.write(f"steps/{key}.json", document)
            if self.store.keep(commit):
                return commit

    def make(self, run_record, key):
        number = self.store.next_number(key)
        name = f"{run_record.run_id}{key}x{number}"
        held = lease.acquire(self.store.objects, key, Holder.here(name, run_record.run_id))
        try:
            attempt = self.store.begin(key, name)
            (attempt.data / "value").write_text(key)
            return self.store.commit(attempt, {}, number=number)
        finally:
            held.release()


@settings(max_examples=40, deadline=None)
@given(ACTIONS)
def test_in_any_history_kept_runs_keep_their_outputs_and_the_rest_goes(actions):
    with tempfile.TemporaryDirectory() as folder:
        histories = Histories(Path(folder))
        store, pinned, now = histories.store, set(), time.time()
        for action in actions:
            if action[0] == "run":
                histories.run(action[1], action[2])
            elif action[0] == "pin" and histories.runs:
                run_id = histories.runs[action[1] % len(histories.runs)]
                garbage.pin(store, run_id, pinned=action[2])
                (pinned.add if action[2] else pinned.discard)(run_id)
            elif action[0] == "collect":
                now += DAY
                during = (lambda keys=action[2]: histories.run(keys)) if action[2] else (lambda: None)
                policy = Policy(action[1], 3600.0)
                collect(store, policy, act=True, clock=lambda now=now: now, before_removal=during)
                newest = histories.runs[-action[1] :] if action[1] else []
                kept = {*newest, *pinned} - histories.lost
                histories.lost |= set(histories.runs) - kept - ({histories.runs[-1]} if action[2] else set())
                for run_id in kept:
                    for attempt in histories.used.get(run_id, ()):
                        (path,) = store.root.glob(f"objects/*/attempts/{attempt}/data/value")
                        assert path.read_text() == path.parents[3].name
        for _ in range(2):
            now += DAY
            collect(store, Policy(1, 3600.0), act=True, clock=lambda now=now: now)
        named = {*histories.runs[-1:], *pinned}
        kept = {attempt for run_id in named - histories.lost for attempt in histories.used[run_id]}
        left = attempts(store)
        assert kept <= left
        used_keys = {a.split("key")[1][0] for run_id in named for a in histories.used[run_id]}
        assert {name.split("key")[1][0] for name in left} <= used_keys, "what no kept run uses is gone"


def test_what_is_used_again_after_it_was_marked_gets_its_whole_grace_period_anew(root):
    run(diamond(3), root)
    run(diamond(4), root)
    store = Store(root)
    assert {item.state for item in collect(store, Policy(1), act=True)} == {"found"}
    assert set(statuses(run(diamond(3), root)).values()) == {"reused"}
    run(diamond(4), root)
    later = time.time() + 2 * DAY
    assert {item.state for item in collect(store, Policy(1), act=True, clock=lambda: later)} == {"found"}
    assert set(statuses(run(diamond(3), root)).values()) == {"reused"}
