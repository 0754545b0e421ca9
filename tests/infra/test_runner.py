"""Runs of toy pipelines through the real engine: reuse, early cutoff, selection, failure, corruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engine import plan, run, statuses, value_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_stages import Config, NumberConfig, diamond, executions, failing, number, total

from ropewalk.infra.plan import Planner, Selection
from ropewalk.infra.record import read_events
from ropewalk.infra.settings import with_settings
from ropewalk.infra.step import External, Pipeline, Step, UserError
from ropewalk.infra.store import Store

pytestmark = pytest.mark.usefixtures("counter")


def test_a_second_run_reuses_everything_and_executes_nothing(tmp_path):
    first = run(diamond(), tmp_path / "store")
    ran = executions(tmp_path)
    second = run(diamond(), tmp_path / "store")
    assert set(statuses(first).values()) == {"ran"} and set(statuses(second).values()) == {"reused"}
    assert executions(tmp_path) == ran
    assert [s.commit.digest for s in first.steps] == [s.commit.digest for s in second.steps]
    assert value_of(second, "last") == 1 + 3 + 10


def test_measurements_do_not_change_the_output_digest(tmp_path):
    digests = {run(diamond(), tmp_path / name).steps[0].commit.digest for name in ("one", "two")}
    assert len(digests) == 1


def test_a_changed_field_reruns_its_step_and_what_depends_on_it(tmp_path):
    run(diamond(), tmp_path / "store")
    changed = with_settings(diamond(), ["right.value=5"])
    assert plan(changed, tmp_path / "store")["right"] == ("run", "config value 0 -> 5")
    assert plan(changed, tmp_path / "store")["last"] == ("may-run", "depends on the output of right")
    assert statuses(run(changed, tmp_path / "store")) == {
        "first": "reused",
        "left": "reused",
        "right": "ran",
        "last": "ran",
    }


def test_an_upstream_change_with_equal_bytes_leaves_the_rest_fresh(tmp_path):
    run(diamond(3), tmp_path / "store")
    result = statuses(run(diamond(5), tmp_path / "store", Selection(until=("left",))))
    assert result["first"] == "ran" and result["left"] == "ran"
    pipeline = diamond(5)
    only_left = Pipeline(
        "p", (pipeline["first"], pipeline["left"], replace(pipeline["right"], inputs={"a": pipeline["left"]}))
    )
    run(Pipeline("p", only_left.steps), tmp_path / "other")
    second = statuses(run(with_settings(only_left, ["first.value=7"]), tmp_path / "other"))
    assert second == {"first": "ran", "left": "ran", "right": "reused"}


def test_external_files_are_part_of_the_key_by_content_not_by_path(tmp_path):
    for name, text in (("a.txt", "xx"), ("b.txt", "xx"), ("c.txt", "xyz")):
        (tmp_path / name).write_text(text)
    plans = [Planner(diamond(external=tmp_path / n), Store(tmp_path / "store")) for n in ("a.txt", "b.txt", "c.txt")]
    step = {"left": "1" * 64, "right": "2" * 64}
    # A file's name is part of what a stage sees, so only a folder shows the path independence.
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.txt").write_text("same")
    keys = []
    for folder in ("one", "two"):
        single = Pipeline("p", (Step("s", total, NumberConfig(), inputs={"f": External(str(tmp_path / folder))}),))
        keys.append(Planner(single, Store(tmp_path / "store")).plan()[0].key)
    assert keys[0] == keys[1]
    decided = [p.decide(p.pipeline["last"], {**step, "first": "0" * 64}).key for p in plans]
    assert len(set(decided)) == 3


def test_a_changed_external_file_is_seen_even_if_its_size_is_the_same(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("xx")
    run(diamond(external=path), tmp_path / "store")
    path.write_text("yy")
    status, reason = plan(diamond(external=path), tmp_path / "store")["last"]
    assert status == "run" and reason.startswith("external input file ")


def test_a_missing_external_input_names_step_slot_and_path(tmp_path):
    with pytest.raises(UserError, match=r"step last, input file: .*nowhere does not exist"):
        run(diamond(external=tmp_path / "nowhere"), tmp_path / "store")


def test_a_failed_step_stops_what_depends_on_it_and_nothing_else(tmp_path):
    switch = tmp_path / "switch"
    switch.touch()
    bad = Step("bad", failing, NumberConfig(note=str(switch)))
    after = Step("after", total, NumberConfig(), inputs={"x": bad})
    good = Step("good", number, NumberConfig(value=2))
    pipeline = Pipeline("p", (bad, after, good))
    result = run(pipeline, tmp_path / "store")
    assert result.status == "failed"
    assert statuses(result) == {"bad": "failed", "after": "skipped", "good": "ran"}
    assert result.steps[0].reason == "value: the switch is on"
    assert not list((tmp_path / "store/objects").glob("*/commits/000001.json"))
    logs = list((tmp_path / "store/runs").glob("*/logs/bad/*.log"))
    assert "Traceback" in logs[0].read_text()
    switch.unlink()
    assert statuses(run(pipeline, tmp_path / "store")) == {"bad": "ran", "after": "ran", "good": "reused"}


def test_force_adds_a_second_commit_and_keeps_the_first(tmp_path):
    run(diamond(), tmp_path / "store")
    result = run(diamond(), tmp_path / "store", Selection(force=("first",)))
    assert statuses(result)["first"] == "ran" and statuses(result)["last"] == "reused"
    key = result.steps[0].key
    assert len(list((tmp_path / "store/objects" / key / "commits").iterdir())) == 2
    assert len(list((tmp_path / "store/objects" / key / "attempts").iterdir())) == 2


def test_only_refuses_when_an_input_is_missing(tmp_path):
    with pytest.raises(UserError, match="step last needs the output of left"):
        run(diamond(), tmp_path / "store", Selection(only=("last",)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_selections_choose_what_the_graph_says(tmp_path, data):
    number_of_steps = data.draw(st.integers(2, 6))
    steps: list[Step] = []
    for index in range(number_of_steps):
        parents = data.draw(st.lists(st.sampled_from(steps), unique_by=lambda s: s.name, max_size=2)) if steps else []
        steps.append(Step(f"s{index}", number, NumberConfig(), inputs={p.name: p for p in parents}))
    pipeline = Pipeline("p", tuple(steps))
    target = data.draw(st.sampled_from(steps)).name

    def reaches(start: str, goal: str) -> bool:
        return start == goal or any(reaches(parent, goal) for parent in pipeline[start].upstream.values())

    everything = {s.name for s in steps}
    assert Selection(start=(target,)).names(pipeline) == {n for n in everything if reaches(n, target)}
    assert Selection(until=(target,)).names(pipeline) == {n for n in everything if reaches(target, n)}
    assert Selection(only=(target,)).names(pipeline) == {target}


@pytest.mark.parametrize("damage", ["delete", "truncate", "manifest", "commit"])
def test_damaged_outputs_are_named_and_made_again_never_consumed(tmp_path, damage):
    first = run(diamond(), tmp_path / "store")
    commit = first.steps[0].commit
    data_file = commit.attempt.data / "value.json"
    commit_file = commit.attempt.folder.parents[1] / "commits" / "000000.json"
    if damage == "delete":
        data_file.unlink()
    elif damage == "truncate":
        data_file.write_text("")
    elif damage == "manifest":
        (commit.attempt.folder / "manifest.json").write_text("{}")
    else:
        commit_file.write_text("")
    status, reason = plan(diamond(), tmp_path / "store")["first"]
    assert status == "run" and reason.startswith("corrupt output: ") and str(commit.attempt.folder.parents[1]) in reason
    result = run(diamond(), tmp_path / "store")
    assert statuses(result)["first"] == "ran" and statuses(result)["last"] == "reused"
    assert result.steps[0].commit.digest == commit.digest


def test_a_manifest_cannot_point_outside_its_attempt(tmp_path):
    from ropewalk.infra.key import canonical_json, sha256_hex

    first = run(diamond(), tmp_path / "store")
    commit = first.steps[0].commit
    manifest = json.loads((commit.attempt.folder / "manifest.json").read_text())
    manifest["files"][0]["path"] = "data/../../../../../etc/passwd"
    text = canonical_json(manifest) + "\n"
    (commit.attempt.folder / "manifest.json").write_text(text)
    commit_path = commit.attempt.folder.parents[1] / "commits" / "000000.json"
    record = json.loads(commit_path.read_text())
    commit_path.write_text(json.dumps({**record, "manifest_sha256": sha256_hex(text)}))
    assert "leaves the attempt's folder" in plan(diamond(), tmp_path / "store")["first"][1]


def test_a_symbolic_link_in_an_output_is_refused(tmp_path):
    class linking:  # noqa: N801
        NAME, VERSION = "linking", 1

        @staticmethod
        def run(config, inputs, output, context):
            (output.data / "link").symlink_to("/etc/passwd")

    import toy_stages

    toy_stages.linking = linking
    linking.__module__, linking.__qualname__ = "toy_stages", "linking"
    result = run(Pipeline("p", (Step("s", linking, Config()),)), tmp_path / "store")
    assert result.status == "failed" and "symbolic links" in result.steps[0].reason


def test_a_record_tells_the_run_in_order(tmp_path):
    result = run(diamond(), tmp_path / "store")
    events = list(read_events(Store(tmp_path / "store"), result.run_id))
    assert [e["seq"] for e in events] == list(range(len(events)))
    assert events[0]["type"] == "run_started" and events[-1]["type"] == "run_finished"
    assert {"step": "first", "metrics": {"value": 3}}.items() <= next(
        e for e in events if e["type"] == "metrics"
    ).items()
    assert events[-1]["status"] == "succeeded"


def test_code_policy_strict_keys_the_code_and_pin_refuses_drift(tmp_path, monkeypatch):
    from ropewalk.infra import closure

    pipeline = diamond()
    run(pipeline, tmp_path / "store")
    real = closure.code_modules
    monkeypatch.setattr(closure, "code_modules", lambda stage: {**real(stage), "toy_stages": "changed"})
    status, reason = plan(pipeline, tmp_path / "store")["first"]
    assert status == "reuse" and "code drift: toy_stages changed" in reason
    strict = Pipeline("diamond", (replace(pipeline["first"], code_policy="strict"),))
    assert plan(strict, tmp_path / "store")["first"][0] == "run"
    pinned = Pipeline("diamond", (replace(pipeline["first"], code_policy="pin"),))
    with pytest.raises(UserError, match="code is pinned but toy_stages changed"):
        plan(pinned, tmp_path / "store")


def test_resources_and_store_place_do_not_enter_the_key(tmp_path):
    from ropewalk.infra.step import Resources

    plain = Planner(diamond(), Store(tmp_path / "a")).plan()[0].key
    step = replace(diamond()["first"], resources=Resources(num_cpus=7, num_gpus=2), worker_resources=Resources(3))
    assert Planner(Pipeline("other", (step,)), Store(tmp_path / "b")).plan()[0].key == plain


def test_secrets_in_configs_reach_no_file_of_the_store(tmp_path):
    secret = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
    pipeline = Pipeline("p", (Step("s", number, NumberConfig(note=f"https://me:{secret}@host/x")),))
    assert statuses(run(pipeline, tmp_path / "store")) == {"s": "ran"}
    assert statuses(run(pipeline, tmp_path / "store")) == {"s": "reused"}
    for path in (tmp_path / "store").rglob("*"):
        assert not path.is_file() or secret not in path.read_text(), path
    changed = with_settings(pipeline, ["s.value=9"])
    assert plan(changed, tmp_path / "store")["s"] == ("run", "config value 1 -> 9")


def test_unusable_store_uri_is_refused():
    with pytest.raises(UserError, match="ftp://host/folder"):
        Store("ftp://host/folder")


def test_external_globs(tmp_path):
    from ropewalk.infra.external import external_files

    for name in ("a.py", "b.txt", "sub/c.py", "sub/deep/d.py", "skip/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    def names(include, exclude=()):
        return [n for n, _ in external_files(External(str(tmp_path), include, exclude), "x")]

    assert names(("**/*.py",)) == ["a.py", "skip/e.py", "sub/c.py", "sub/deep/d.py"]
    assert names(("*.py",)) == ["a.py"]
    assert names(("**/*.py",), ("skip/**", "sub/deep/*")) == ["a.py", "sub/c.py"]
    assert names(("[ab].*",)) == ["a.py", "b.txt"]
    assert Path(external_files(External(str(tmp_path / "a.py")), "x")[0][1]).name == "a.py"
