"""The engine on an S3-compatible object store, against a real server of that protocol."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine import plan, run, statuses
from object_store_server import new_bucket, object_store_server
from obstore.exceptions import AlreadyExistsError
from toy_stages import NumberConfig, diamond, executions, failing

from ropewalk.infra import record
from ropewalk.infra.plan import Selection
from ropewalk.infra.remote import object_store
from ropewalk.infra.step import Pipeline, Step, UserError
from ropewalk.infra.store import Store, StoreError

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def server():
    with object_store_server() as endpoint:
        yield endpoint


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Go on as another machine: with a scratch folder of its own."""

    def move(name="elsewhere"):
        monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / name))

    move("here")
    return move


@pytest.fixture
def bucket(elsewhere):
    return f"{new_bucket()}/a prefix"


@pytest.fixture
def counter(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    return tmp_path


def digests(result):
    return [step.commit.digest for step in result.steps]


def test_a_pipeline_runs_is_reused_forced_and_gives_the_digests_of_a_local_store(bucket, counter, tmp_path, elsewhere):
    first = run(diamond(), bucket)
    assert set(statuses(first).values()) == {"ran"}
    assert digests(first) == digests(run(diamond(), tmp_path / "local"))
    assert all(step.commit.uri.startswith(bucket) for step in first.steps)
    (counter / "executions").unlink()
    elsewhere()
    assert set(statuses(run(diamond(), bucket)).values()) == {"reused"}
    assert executions(counter) == []
    forced = run(diamond(), bucket, Selection(force=("right",)))
    assert statuses(forced) == {"first": "reused", "left": "reused", "right": "ran", "last": "reused"}
    assert forced.steps[2].commit.number == 1
    assert digests(forced) == digests(first)


def test_the_record_of_a_run_is_read_on_another_machine(bucket, elsewhere, tmp_path):
    switch = tmp_path / "switch"
    switch.touch()
    failing_step = Step("failing", failing, NumberConfig(note=str(switch)))
    result = run(Pipeline("diamond", (*diamond(), failing_step)), bucket)
    here = Store(bucket)
    events = list(record.read_events(here, result.run_id))
    elsewhere()
    there = Store(bucket)
    assert there.root != here.root
    assert record.run_ids(there) == [result.run_id]
    assert list(record.read_events(there, result.run_id)) == events
    assert record.previous_step(there, "diamond", "last")["digest"] == result.steps[3].commit.digest
    (log,) = (here.root / "runs" / result.run_id / "logs" / "failing").iterdir()
    assert "the switch is on" in log.read_text()
    assert not (there.root / log.relative_to(here.root)).exists(), "logs may be long; they are brought when asked for"
    there.pull_runs(logs_of=result.run_id)
    assert (there.root / log.relative_to(here.root)).read_bytes() == log.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "gone", "manifest", "commit"])
def test_damage_is_named_and_only_what_is_needed_runs_again(bucket, counter, damage):
    first = run(diamond(), bucket)
    store, commit = Store(bucket), first.steps[2].commit
    folder = f"objects/{commit.key}/attempts/{commit.attempt.name}"
    name = {
        "truncated": f"{folder}/data/value.json",
        "gone": f"{folder}/data/value.json",
        "manifest": f"{folder}/manifest.json",
        "commit": f"objects/{commit.key}/commits/000000.json",
    }[damage]
    if damage == "manifest":
        (commit.attempt.folder / "manifest.json").unlink()
    if damage == "gone":
        store.objects.remove(name)
    else:
        store.objects.write(name, b"")
    status, reason = plan(diamond(), bucket)["right"]
    assert status == "run" and reason.startswith("corrupt output: ") and f"{bucket}/{name}" in reason
    (counter / "executions").unlink()
    again = run(diamond(), bucket)
    assert statuses(again) == {"first": "reused", "left": "reused", "right": "ran", "last": "reused"}
    assert again.steps[2].commit.number == 1
    assert digests(again) == digests(first)


def test_changed_content_is_found_by_a_deep_look_and_never_fetched(bucket, elsewhere):
    commit = run(diamond(), bucket).steps[0].commit
    store = Store(bucket)
    name = f"objects/{commit.key}/attempts/{commit.attempt.name}/data/value.json"
    content = store.objects.read(name)
    store.objects.write(name, b"9" * len(content))
    assert store.problems(commit) == []
    assert store.problems(commit, deep=True) == [f"{bucket}/{name}: content changed since it was committed"]
    elsewhere()
    with pytest.raises(OSError, match=r"value.json: content changed"):
        Store(bucket).fetch(commit.uri)
    assert not list(Store(bucket).root.rglob("value.json"))


def test_of_many_committers_of_one_number_one_wins_and_the_others_take_its_output(bucket):
    def commit(number):
        store = Store(bucket)
        attempt = store.begin("key", f"attempt{number}")
        (attempt.data / "value").write_text(str(number))
        return store.commit(attempt, {}, number=0)

    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(commit, range(8)))
    store = Store(bucket)
    assert len({c.attempt.name for c in commits}) == 1
    assert store.numbers("key") == [0]
    assert store.objects.names("objects/key/attempts") == [commits[0].attempt.name]


def test_a_number_that_was_taken_by_an_unreadable_commit_is_refused(bucket):
    store = Store(bucket)
    attempt = store.begin("key", "attempt")
    (attempt.data / "value").write_text("1")
    store.objects.create("objects/key/commits/000000.json", b"{}")
    with pytest.raises(StoreError, match="commit 0 of this key was made by somebody else and is not valid"):
        store.commit(attempt, {}, number=0)
    assert store.next_number("key") == 1
    assert store.commit(attempt, {}, number=1).number == 1


def test_one_who_lost_the_answer_to_a_creation_learns_that_it_was_first(bucket):
    objects = Store(bucket).objects
    assert objects.create("a", b"mine")
    assert objects.create("a", b"mine"), "the client repeats a request whose answer was lost"
    assert not objects.create("a", b"another's")
    assert objects.read("a") == b"mine"


@pytest.mark.parametrize("point", ["before the manifest", "before the commit", "after the commit"])
def test_killed_between_upload_and_commit_the_next_machine_completes(bucket, counter, elsewhere, point):
    driver = TESTS / "faults" / "crashing_driver.py"
    killed = subprocess.run([sys.executable, str(driver), bucket, point, "right"], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL, "the driver was to die at this point"
    store = Store(bucket)
    uploaded = [key for key in store.objects.names("objects") if store.objects.names(f"objects/{key}/attempts")]
    assert len(uploaded) == 3, "the data of the killed attempt is in the store"
    elsewhere()
    os.environ["ROPEWALK_LEASE_SECONDS"] = "0.5"
    again = run(diamond(), bucket)
    assert statuses(again)["right"] == ("reused" if point == "after the commit" else "ran")
    assert set(statuses(again).values()) <= {"ran", "reused"}


def test_names_of_files_survive_the_way_through_the_store(bucket, elsewhere):
    names = ["a b.txt", "p%41ü/x#y?.json", "deep/er/empty", "~tilde+[1]*"]
    store = Store(bucket)
    attempt = store.begin("key", "attempt")
    for name in names:
        (attempt.data / name).parent.mkdir(parents=True, exist_ok=True)
        (attempt.data / name).write_text("" if name.endswith("empty") else name)
    commit = store.commit(attempt, {}, number=0)
    elsewhere()
    folder = Store(bucket).fetch(commit.uri)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(names)


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(bucket, elsewhere):
    store = Store(bucket)
    attempt = store.begin("key", "attempt")
    (attempt.data / "large").write_bytes(os.urandom(21 << 20))
    commit = store.commit(attempt, {}, number=0)
    assert store.problems(commit, deep=True) == []
    elsewhere()
    fetched = Store(bucket).fetch(commit.uri) / "large"
    assert fetched.read_bytes() == (attempt.data / "large").read_bytes()
    before = fetched.stat().st_ino
    fetched.write_bytes(b"cut off")
    assert (Store(bucket).fetch(commit.uri) / "large").stat().st_size == 21 << 20
    assert before != fetched.stat().st_ino


def test_uris_with_secrets_and_missing_buckets_are_refused_without_repeating_the_secret(bucket):
    for uri in ("s3://name:secret@bucket/x", "s3://bucket/x?secret=1", "s3://"):
        with pytest.raises(UserError) as refused:
            Store(uri)
        assert "secret@" not in str(refused.value) and "secret=" not in str(refused.value)
    missing = Store("s3://no-such-bucket-here/x")
    for call in (lambda: missing.latest("key"), lambda: missing.objects.create("x", b"1")):
        with pytest.raises(OSError, match="s3://no-such-bucket-here: there is no such bucket"):
            call()


def test_the_manifest_of_a_remote_attempt_cannot_lead_a_download_out_of_its_folder(bucket, elsewhere):
    from ropewalk.infra.key import canonical_json, sha256_hex

    store = Store(bucket)
    attempt = store.begin("key", "attempt")
    (attempt.data / "value").write_text("1")
    commit = store.commit(attempt, {}, number=0)
    manifest_name = "objects/key/attempts/attempt/manifest.json"
    for path in ("data/../../../../../evil", "/evil", "elsewhere/value", "data/./../../evil"):
        manifest = json.loads(store.objects.read(manifest_name))
        manifest["files"][0]["path"] = path
        text = canonical_json(manifest) + "\n"
        document = json.loads(store.objects.read("objects/key/commits/000000.json"))
        document["manifest_sha256"] = sha256_hex(text)
        store.objects.write(manifest_name, text.encode())
        store.objects.write("objects/key/commits/000000.json", json.dumps(document).encode())
        elsewhere(f"machine-{sha256_hex(path)[:6]}")
        found, problems = Store(bucket).latest("key")
        assert found is None and "leaves the attempt's folder" in problems[0]
        with pytest.raises(StoreError, match="leaves the attempt's folder"):
            Store(bucket).fetch(commit.uri)


def test_readers_on_one_machine_fetch_the_same_output_at_once(bucket, elsewhere):
    commit = run(diamond(), bucket).steps[0].commit
    elsewhere()
    found, barrier = [], threading.Barrier(6)

    def fetch():
        barrier.wait()
        found.append((Store(bucket).fetch(commit.uri) / "value.json").read_text())

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["3"] * 6


def test_files_that_a_stage_has_changed_in_its_input_are_brought_anew(bucket, elsewhere):
    commit = run(diamond(), bucket).steps[0].commit
    for name in ("here", "elsewhere"):
        elsewhere(name)
        fetched = Store(bucket).fetch(commit.uri) / "value.json"
        assert fetched.read_text() == "3"
        before = fetched.stat()
        fetched.write_text("4")
        os.utime(fetched, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (Store(bucket).fetch(commit.uri) / "value.json").read_text() == "3"


def test_files_that_nobody_has_touched_are_neither_brought_nor_read_again(bucket, elsewhere, monkeypatch):
    commit = run(diamond(), bucket).steps[0].commit

    def refuse(path):
        raise AssertionError(f"{path} is read")

    elsewhere()
    Store(bucket).fetch(commit.uri)
    monkeypatch.setattr(object_store, "file_sha256", refuse)
    for name in ("here", "elsewhere"):
        elsewhere(name)
        store = Store(bucket)
        monkeypatch.setattr(store.objects, "_chunks", refuse)
        assert (store.fetch(commit.uri) / "value.json").read_text() == "3"
        monkeypatch.undo()
        monkeypatch.setattr(object_store, "file_sha256", refuse)
        elsewhere(name)


def test_a_creation_that_is_refused_while_another_comes_to_nothing_is_tried_again(bucket, monkeypatch):
    objects = Store(bucket).objects
    put, refusals = object_store.obstore.put, [AlreadyExistsError("409: another request is under way")] * 2

    def refused(*arguments, **options):
        if refusals:
            raise refusals.pop()
        return put(*arguments, **options)

    monkeypatch.setattr(object_store.obstore, "put", refused)
    assert objects.create("a", b"mine") and refusals == []
    assert not objects.create("a", b"another's") and objects.read("a") == b"mine"
