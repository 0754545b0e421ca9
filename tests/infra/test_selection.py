"""What a user selects is what runs: compared with a definition by reachability on random graphs."""

from dataclasses import replace

import pytest
from engine import run, statuses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_stages import NumberConfig, diamond, executions, failing, number, total
from unruly_stages import Config as UnrulyConfig
from unruly_stages import drawing, flaky

from ropewalk.infra.plan import Planner, Selection
from ropewalk.infra.record import History
from ropewalk.infra.settings import with_settings
from ropewalk.infra.step import Pipeline, Step, UserError
from ropewalk.infra.store import Store

pytestmark = pytest.mark.usefixtures("counter")
NO_NAMES = st.just(())


@st.composite
def graphs(draw):
    steps: list[Step] = []
    for index in range(draw(st.integers(1, 7))):
        parents = draw(st.lists(st.sampled_from(steps), unique_by=lambda s: s.name, max_size=3)) if steps else []
        # Different values, or equal steps would share a key.
        steps.append(Step(f"s{index}", total, NumberConfig(value=index), inputs={p.name: p for p in parents}))
    return Pipeline("p", tuple(steps))


@st.composite
def selections(draw, pipeline):
    names = [step.name for step in pipeline]

    def some():
        return tuple(draw(st.one_of(NO_NAMES, st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))))

    only = some()
    return Selection(only, some(), some(), (), bool(only) and draw(st.booleans()), draw(st.booleans())), frozenset(
        some()
    )


def reaches(pipeline, start, goal):
    """Whether `start` is `goal` or depends on it, by following every path."""
    return start == goal or any(reaches(pipeline, parent, goal) for parent in pipeline[start].upstream.values())


def chosen_by_definition(pipeline, selection, failed):
    def chosen(name):
        needed_by = [reaches(pipeline, target, name) for target in selection.only]
        return (
            (not selection.only or name in selection.only or (selection.with_upstream and any(needed_by)))
            and (not selection.start or any(reaches(pipeline, name, target) for target in selection.start))
            and (not selection.until or any(reaches(pipeline, target, name) for target in selection.until))
            and (not selection.rerun_failed or any(reaches(pipeline, target, name) for target in failed))
        )

    return {step.name for step in pipeline if chosen(step.name)}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_selections_choose_what_the_graph_says(data):
    pipeline = data.draw(graphs())
    selection, failed = data.draw(selections(pipeline))
    assert selection.names(pipeline, failed) == chosen_by_definition(pipeline, selection, failed)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_run_executes_what_is_selected_and_nothing_else(tmp_path_factory, data):
    pipeline = data.draw(graphs())
    selection, _ = data.draw(selections(pipeline))
    selection = replace(selection, rerun_failed=False)
    root = tmp_path_factory.mktemp("store")
    chosen = chosen_by_definition(pipeline, selection, set())
    lacking = {name for name in chosen for parent in pipeline[name].upstream.values() if parent not in chosen}
    if lacking:
        with pytest.raises(UserError, match="which is neither committed nor selected"):
            run(pipeline, root, selection)
        assert not Store(root).known_keys()
        return
    ran = {name for name, status in statuses(run(pipeline, root, selection)).items() if status == "ran"}
    assert ran == chosen
    again = statuses(run(pipeline, root))
    assert {name for name, status in again.items() if status == "reused"} == chosen
    assert {name for name, status in again.items() if status == "ran"} == {s.name for s in pipeline} - chosen


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_forced_step_runs_again_and_equal_bytes_leave_the_rest_fresh(tmp_path_factory, data):
    pipeline, root = data.draw(graphs()), tmp_path_factory.mktemp("store")
    run(pipeline, root)
    forced = data.draw(st.sets(st.sampled_from([s.name for s in pipeline])))
    result = statuses(run(pipeline, root, Selection(force=tuple(forced))))
    assert {name for name, status in result.items() if status == "ran"} == forced


def test_forcing_a_step_that_draws_at_random_makes_what_depends_on_it_stale(tmp_path):
    first = Step("first", drawing, NumberConfig())
    pipeline = Pipeline("p", (first, Step("last", total, NumberConfig(), inputs={"x": first})))
    run(pipeline, tmp_path / "store")
    result = run(pipeline, tmp_path / "store", Selection(force=("first",)))
    assert statuses(result) == {"first": "ran", "last": "ran"}


def test_only_with_upstream_brings_what_is_needed(tmp_path):
    result = run(diamond(), tmp_path / "store", Selection(only=("left",), with_upstream=True))
    assert statuses(result) == {"first": "ran", "left": "ran", "right": "skipped", "last": "skipped"}
    assert result.status == "succeeded"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(with_upstream=True), "--with-upstream goes with --only"),
        (Selection(only=("lft",)), "no step is called 'lft'; did you mean 'left'"),
        (Selection(until=("left",), force=("last",)), "--force last: the step is not among the selected ones"),
    ],
)
def test_selections_that_mean_nothing_are_refused(selection, message):
    with pytest.raises(UserError, match=message):
        selection.names(diamond())


def failing_pipeline(tmp_path, switch):
    first = Step("first", number, NumberConfig(value=3))
    bad = Step("bad", failing, NumberConfig(note=str(switch)), inputs={"x": first})
    other = Step("other", flaky, UnrulyConfig(folder=str(tmp_path), num_failures=1, error="value"))
    after = Step("after", total, NumberConfig(), inputs={"x": bad})
    fresh = Step("fresh", number, NumberConfig(value=9))
    return Pipeline("p", (first, bad, other, after, fresh))


def test_rerun_failed_runs_what_failed_last_and_nothing_else(tmp_path):
    switch = tmp_path / "switch"
    switch.touch()
    pipeline = failing_pipeline(tmp_path, switch)
    run(pipeline, tmp_path / "store", Selection(until=("after", "other")))
    switch.unlink()
    result = run(pipeline, tmp_path / "store", Selection(rerun_failed=True))
    assert statuses(result) == {
        "first": "reused", "bad": "ran", "other": "ran", "after": "skipped", "fresh": "skipped"
    }  # fmt: skip
    assert result.status == "succeeded"
    nothing = run(pipeline, tmp_path / "store", Selection(rerun_failed=True))
    assert executions(tmp_path).count("failing") == 2, "what has succeeded since is no failure any more"
    assert set(statuses(nothing).values()) == {"reused", "skipped"}


def test_rerun_drifted_runs_what_changed_code_has_made(tmp_path, monkeypatch):
    from ropewalk.infra import closure

    run(diamond(), tmp_path / "store")
    real = closure.code_modules
    monkeypatch.setattr(
        closure, "code_modules", lambda stage: {**real(stage), "extra": "x"} if stage is total else real(stage)
    )
    assert set(statuses(run(diamond(), tmp_path / "store")).values()) == {"reused"}
    (_, _, right, _) = Planner(diamond(), Store(tmp_path / "store")).plan()
    assert right.status == "reuse" and [r.to_json() for r in right.reasons] == [
        {"kind": "drifted", "text": "code drift: extra changed since", "modules": ["extra"]}
    ]
    result = run(diamond(), tmp_path / "store", Selection(rerun_drifted=True))
    assert statuses(result) == {"first": "reused", "left": "reused", "right": "ran", "last": "ran"}


def test_reasons_are_structured(tmp_path):
    def reasons(pipeline, name):
        plans = {p.name: p for p in Planner(pipeline, Store(tmp_path / "store")).plan()}
        return [reason.to_json() for reason in plans[name].reasons]

    assert [r["kind"] for r in reasons(diamond(), "first")] == ["never run"]
    assert reasons(diamond(), "left")[0] | {"text": ""} == {"kind": "upstream", "text": "", "steps": ["first"]}
    result = run(diamond(), tmp_path / "store")
    assert reasons(diamond(), "first") == []
    changed = with_settings(diamond(), ["first.value=5", "first.note=x"])
    assert [(r["kind"], r["field"], r["before"], r["now"]) for r in reasons(changed, "first")] == [
        ("config", "note", "", "x"),
        ("config", "value", 3, 5),
    ]
    newer = type("number", (number,), {"VERSION": 2, "__module__": "toy_stages"})
    (version,) = reasons(Pipeline("diamond", (replace(diamond()["first"], stage=newer),)), "first")
    assert (version["kind"], version["before"], version["now"]) == ("version", 1, 2)
    (result.steps[0].commit.attempt.data / "value.json").unlink()
    (corrupt,) = reasons(diamond(), "first")
    assert corrupt["kind"] == "corrupt" and corrupt["problems"][0].endswith("value.json: gone")


def test_history_reads_every_run_once_and_no_more_than_it_needs(tmp_path, monkeypatch):
    from ropewalk.infra import record

    for _ in range(4):
        run(diamond(), tmp_path / "store")
    reads = []
    real = record.read_run
    monkeypatch.setattr(record, "read_run", lambda store, run_id: reads.append(run_id) or real(store, run_id))
    history = History(Store(tmp_path / "store"), "diamond")
    assert history.output("last")["key"] and history.output("first")["key"]
    assert len(reads) == 1
    assert history.output("unheard-of") is None and history.failure("unheard-of") is None
    assert len(reads) == len(set(reads)) == 4
